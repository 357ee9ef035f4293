"""Which of the tower's outputs, and which positions, belong to a rank that holds only its part of a pack.

Of each padded segment a context-parallel rank holds chunks r and 2 * cp_size - 1 - r (`zigzag.py`). It cannot see how
many image and video placeholders the other chunks hold; from these counts follow which of the tower's outputs its own
placeholders take, and how much the images before a token shift the positions (the rule of `positions.py`). An image
whose placeholders are interrupted by another token shows only on the rank that holds that token, so each rank also
reports after how many placeholders it holds other tokens; then all ranks reject it alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.frames import Grid
from megatron_vlbridge.layout.vision_items import VisionItems, as_int64, cumulative
from megatron_vlbridge.layout.zigzag import check_divisible, zigzag_index


@dataclass(frozen=True)
class ShardCounts:
    """What a rank reports of its part of a pack.

    `placeholders` int64 `[segments, 2, 2]`: of each segment, this rank's first and second chunk, images and videos.
    `stops` int64 `[n, 3]`: kind (0 image, 1 video), run (2 * segment + 0 or 1), and a count of that kind's placeholders
    in the run after which there is another token; each once.
    """

    placeholders: Tensor
    stops: Tensor


@dataclass(frozen=True)
class ShardPlaces:
    """Positions and image tokens of a rank's part of a pack: all int64.

    `position_ids` `[3, T]`; `vision_token_index` `[n]`, the places of its placeholders among its tokens, and
    `vision_embed_index` `[n]`, the tower's outputs (images first, then videos) that belong there.
    """

    position_ids: Tensor
    vision_token_index: Tensor
    vision_embed_index: Tensor


@dataclass(frozen=True)
class ShardedPack:
    """A pack of padded `segments`, spread over `cp_size` ranks, and the grids of all its images and videos in order.

    Raises VLBridgeError where a segment cannot be split, or a grid is invalid.

    Example: `pack = ShardedPack((8,), 2, image_grids=((1, 4, 4),), video_grids=(), merge_size=2)`; each rank calls
    `pack.count(kinds)`, and with the `counts` of all ranks `pack.check(counts)` and `pack.places(kinds, counts, rank)`.
    """

    segments: tuple[int, ...]
    cp_size: int
    image_grids: Sequence[Grid]
    video_grids: Sequence[Grid]
    merge_size: int

    def __post_init__(self) -> None:
        check_divisible(self.segments, self.cp_size)
        _ = self._items  # rejects invalid grids

    def count(self, kinds: Tensor) -> ShardCounts:
        """What a rank reports of its tokens; `kinds` bool `[2, T]`: which are image placeholders, which are videos'.

        Raises VLBridgeError where T is not the length of a rank's part.
        """
        expected = sum(self.segments) // self.cp_size
        if kinds.shape != (2, expected):
            raise VLBridgeError(
                f"a rank's part of {len(self.segments)} segments of together {sum(self.segments)} tokens, spread over "
                f"{self.cp_size} ranks, is {expected} tokens, found {kinds.shape[-1]}"
            )
        run, within = self._within_runs(kinds)
        placeholders = torch.zeros(2 * len(self.segments), 2, dtype=torch.int64).index_add_(0, run, kinds.T.long())
        stops = []
        for kind in range(2):
            # Runs and counts never decrease, nor do they as one integer, so repeats are adjacent.
            keys = (run * (expected + 1) + within[kind])[~kinds[kind]].unique_consecutive()
            stops.append(torch.stack((torch.full_like(keys, kind), keys // (expected + 1), keys % (expected + 1)), 1))
        return ShardCounts(placeholders.view(-1, 2, 2), torch.cat(stops))

    def check(
        self,
        counts: Sequence[ShardCounts],
        images_per_segment: Sequence[int] | None = None,
        videos_per_segment: Sequence[int] | None = None,
    ) -> None:
        """Reject placeholders that do not match the grids; every rank that has all `counts` gets the same result.

        Raises VLBridgeError where a segment does not hold the placeholders of whole images (as many as
        `..._per_segment` says, if given), an image has no placeholders, or another token is inside one.
        """
        for kind, per_segment in enumerate((images_per_segment, videos_per_segment)):
            held = torch.stack([each.placeholders[:, :, kind].sum(1) for each in counts])
            self._items[kind].check_segments(held)
            if per_segment is not None:
                self._items[kind].check_counts(held, as_int64(per_segment))
        stops = torch.cat([each.stops for each in counts])
        rank = torch.arange(len(counts)).repeat_interleave(torch.tensor([len(each.stops) for each in counts]))
        of_kind, run, count = stops.unbind(1)
        segment = run // 2
        chunk = torch.where(run % 2 == 0, rank, 2 * self.cp_size - 1 - rank)
        seen = self._before(counts)[of_kind, segment, chunk] + count
        for kind, items in enumerate(self._items):
            mine = (of_kind == kind).nonzero().flatten()
            items.check_whole(seen[mine], segment[mine], rank[mine], self.cp_size)

    def places(self, kinds: Tensor, counts: Sequence[ShardCounts], cp_rank: int) -> ShardPlaces:
        """Positions and image tokens of `cp_rank`, whose `kinds` it counted, once `check` has passed."""
        run, within = self._within_runs(kinds)
        segment = run // 2
        before = self._before(counts)
        seen = before[:, :, self._chunks(cp_rank)].flatten(1)[:, run] + within
        lengths = torch.tensor(self.segments)
        # A token's position is its place in the segment, corrected by what the images before it add.
        start = lengths.cumsum(0) - lengths
        here = zigzag_index(self.segments, self.cp_size, cp_rank) - start[segment]
        for kind, items in enumerate(self._items):
            here = here + items.drift(seen[kind]) - items.drift(before[kind, :, 0])[segment]
        positions = here.repeat(3, 1)
        embeds = seen[0].clone()
        for kind, items in enumerate(self._items):
            where = kinds[kind].nonzero().flatten()
            positions[:, where] += items.coordinates(seen[kind, where])
            embeds[where] = seen[kind, where] + (int(self._items[0].bounds[-1]) if kind else 0)
        vision = (kinds[0] | kinds[1]).nonzero().flatten()
        return ShardPlaces(positions, vision, embeds[vision])

    @cached_property
    def _items(self) -> tuple["_Items", "_Items"]:
        images = _Items("image", self.image_grids, self.merge_size)
        return images, _Items("video", self.video_grids, self.merge_size)

    def _chunks(self, cp_rank: int) -> Tensor:
        """The two chunks of every segment that a rank holds."""
        return torch.tensor([cp_rank, 2 * self.cp_size - 1 - cp_rank])

    def _within_runs(self, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token its run `[T]`, and how many placeholders of each kind precede it in that run `[2, T]`."""
        sizes = (torch.tensor(self.segments) // (2 * self.cp_size)).repeat_interleave(2)
        run = torch.arange(len(sizes)).repeat_interleave(sizes, output_size=kinds.shape[1])
        before = kinds.long().cumsum(1) - kinds.long()
        return run, before - before[:, sizes.cumsum(0) - sizes][:, run]

    def _before(self, counts: Sequence[ShardCounts]) -> Tensor:
        """Placeholders of each kind in the pack before each chunk: int64 `[2, segments, 2 * cp_size]`."""
        held = torch.stack([each.placeholders for each in counts])
        chunks = torch.cat((held[:, :, 0], held[:, :, 1].flip(0))).permute(2, 1, 0)
        return (chunks.flatten(1).cumsum(1) - chunks.flatten(1)).view(chunks.shape)


class _Items(VisionItems):
    """The images or the videos of a pack, where a rank's tokens begin anywhere among them."""

    def __init__(self, kind: str, grids: Sequence[Grid], merge_size: int) -> None:
        super().__init__(kind, torch.tensor(grids, dtype=torch.int64).view(-1, 3), merge_size)
        # How far the position has advanced before each block.
        self.advance = cumulative(self.blocks[:, 1:].amax(1))

    def drift(self, seen: Tensor) -> Tensor:
        """After `seen` placeholders: what the whole blocks among them add to the position, less the placeholders."""
        return self.advance[self._whole_blocks(seen)] - seen

    def coordinates(self, index: Tensor) -> Tensor:
        """Frame, row and column of the placeholders at `index` `[n]`: int64 `[3, n]`."""
        block = self._whole_blocks(index)
        _, rows, cols = self.blocks[block].unbind(1)
        inside = index - self.block_bounds[block]
        return torch.stack((inside // (rows * cols), inside // cols % rows, inside % cols))

    def check_whole(self, seen: Tensor, segment: Tensor, rank: Tensor, cp_size: int) -> None:
        """Reject `seen` `[n]`: counts of placeholders after which a rank's other token interrupts a block."""
        block = self._whole_blocks(seen)
        broken = (self.block_bounds[block] != seen).nonzero().flatten()
        if len(broken):
            first = int(broken[0])
            start, end = (int(self.block_bounds[block[first] + i]) for i in (0, 1))
            raise VLBridgeError(
                f"segment {int(segment[first])}: {self.name(int(self.item[block[first]]))} needs {end - start} "
                f"placeholder tokens in a row, but after {int(seen[first]) - start} of them context-parallel rank "
                f"{int(rank[first])} holds another token. Each rank r of {cp_size} must hold chunks r and "
                f"{2 * cp_size - 1} - r of each padded segment, images and video frames uninterrupted"
            )

    def _whole_blocks(self, seen: Tensor) -> Tensor:
        """How many blocks are whole after `seen` placeholders."""
        return torch.searchsorted(self.block_bounds, seen.contiguous(), right=True) - 1
