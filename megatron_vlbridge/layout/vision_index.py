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
from megatron_vlbridge.layout.frames import Grid, check_grids
from megatron_vlbridge.layout.zigzag import check_divisible, zigzag_index

KINDS = ("image", "video")


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

    Raises:
        VLBridgeError: where a segment cannot be split, or a grid is invalid.

    Example:
        >>> pack = ShardedPack((8,), 2, image_grids=((1, 4, 4),), video_grids=(), merge_size=2)
        >>> tokens = torch.tensor([5, 9, 9, 9, 9, 5, 5, 5])  # 9: the image's placeholder
        >>> parts = [torch.stack((part == 9, part == 7)) for part in (tokens[[0, 1, 6, 7]], tokens[2:6])]
        >>> counts = [pack.count(part) for part in parts]
        >>> pack.check(counts)
        >>> pack.places(parts[1], counts, 1).position_ids.tolist()
        [[1, 1, 1, 3], [1, 2, 2, 3], [2, 1, 2, 3]]
    """

    segments: tuple[int, ...]
    cp_size: int
    image_grids: Sequence[Grid]
    video_grids: Sequence[Grid]
    merge_size: int

    def __post_init__(self) -> None:
        check_divisible(self.segments, self.cp_size)
        for kind, grids in zip(KINDS, (self.image_grids, self.video_grids), strict=True):
            check_grids(kind, torch.tensor(grids, dtype=torch.int64).view(-1, 3), self.merge_size)

    def count(self, kinds: Tensor) -> ShardCounts:
        """What a rank reports of its tokens; `kinds` bool `[2, T]`: which are image placeholders, which are videos'.

        Raises:
            VLBridgeError: where T is not the length of a rank's part.
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

        Raises:
            VLBridgeError: where a segment does not hold the placeholders of whole images (as many as
                `..._per_segment` says, if given), an image has no placeholders, or another token is inside one.
        """
        for kind, per_segment in enumerate((images_per_segment, videos_per_segment)):
            by_rank = torch.stack([each.placeholders[:, :, kind].sum(1) for each in counts])
            self._items[kind].check_segments(by_rank)
            if per_segment is not None:
                self._items[kind].check_counts(by_rank, per_segment)
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
        return (
            _Items("image", self.image_grids, self.merge_size),
            _Items("video", self.video_grids, self.merge_size),
        )

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


class _Items:
    """The images or the videos of a pack; their placeholders are indexed from 0.

    A block is what has its placeholders in a row: an image, or one frame of a video. `bounds[k]` and `block_bounds[k]`
    count the placeholders before item k and before block k.
    """

    def __init__(self, kind: str, grids: Sequence[Grid], merge_size: int) -> None:
        self.kind, self.grids = kind, tuple(grids)
        merged = torch.tensor(self.grids, dtype=torch.int64).view(-1, 3) // torch.tensor([1, merge_size, merge_size])
        self.bounds = _bounds(merged.prod(1))
        self.item = torch.arange(len(self.grids))
        if kind == "video":
            self.item = self.item.repeat_interleave(merged[:, 0])
            merged = merged[self.item]
            merged[:, 0] = 1
        self.merged = merged
        self.block_bounds = _bounds(merged.prod(1))
        self.advance = _bounds(merged[:, 1:].amax(1)) if len(merged) else torch.zeros(1, dtype=torch.int64)

    def drift(self, seen: Tensor) -> Tensor:
        """After `seen` placeholders: what the whole blocks among them add to the position, less the placeholders."""
        return self.advance[self._whole_blocks(seen)] - seen

    def coordinates(self, index: Tensor) -> Tensor:
        """Frame, row and column of the placeholders at `index` `[n]`: int64 `[3, n]`."""
        block = self._whole_blocks(index)
        _, rows, cols = self.merged[block].unbind(1)
        inside = index - self.block_bounds[block]
        return torch.stack((inside // (rows * cols), inside // cols % rows, inside % cols))

    def check_segments(self, by_rank: Tensor) -> None:
        """Reject `by_rank` `[ranks, segments]` placeholders that are not those of whole items, and unused items."""
        ends = by_rank.sum(0).cumsum(0)
        cut = (~torch.isin(ends, self.bounds)).nonzero().flatten()
        if len(cut):
            segment = int(cut[0])
            before = 0 if segment == 0 else int(ends[segment - 1])
            first = int(torch.searchsorted(self.bounds, before))
            raise VLBridgeError(
                f"{self._found(segment, by_rank)}; the next grids, {list(self.grids[first : first + 3])} from "
                f"{self.kind} {first} on, make {self._sizes(first)}, and a segment holds whole {self.kind}s. "
                f"In all {int(ends[-1])} placeholders for {len(self.grids)} {self.kind}s of {int(self.bounds[-1])} "
                f"tokens. Give every rank all grids of the pack in order, and split no {self.kind} at a segment's end"
            )
        if int(ends[-1]) != int(self.bounds[-1]):
            first = int(torch.searchsorted(self.bounds, ends[-1]))
            raise VLBridgeError(
                f"{self.kind} {first} with grid {self.grids[first]} has no placeholders: the pack's {by_rank.shape[1]} "
                f"segments hold {int(ends[-1])} {self.kind} placeholder tokens (context-parallel ranks: "
                f"{by_rank.sum(1).tolist()}), its {len(self.grids)} grids make {int(self.bounds[-1])}. Leave out grids "
                "and patches of images that are not in the pack, and check that no rank got another rank's tokens"
            )

    def check_counts(self, by_rank: Tensor, per_segment: Sequence[int]) -> None:
        """Reject segments that do not hold the placeholders of as many items as `per_segment` says."""
        if len(per_segment) != by_rank.shape[1] or min(per_segment) < 0 or sum(per_segment) != len(self.grids):
            raise VLBridgeError(
                f"{self.kind}s_per_segment: expected {by_rank.shape[1]} counts >= 0 that sum to {len(self.grids)}, "
                f"the number of grids; found {list(per_segment)}"
            )
        expected = self.bounds[torch.tensor(per_segment).cumsum(0)].diff(prepend=self.bounds[:1])
        wrong = (by_rank.sum(0) != expected).nonzero().flatten()
        if len(wrong):
            segment = int(wrong[0])
            raise VLBridgeError(
                f"{self._found(segment, by_rank)}; its {per_segment[segment]} {self.kind}s "
                f"({self.kind}s_per_segment) make {int(expected[segment])}"
            )

    def check_whole(self, seen: Tensor, segment: Tensor, rank: Tensor, cp_size: int) -> None:
        """Reject `seen` `[n]`: counts of placeholders after which a rank's other token interrupts a block."""
        block = self._whole_blocks(seen)
        broken = (self.block_bounds[block] != seen).nonzero().flatten()
        if len(broken):
            first = int(broken[0])
            item = int(self.item[block[first]])
            start, end = (int(self.block_bounds[block[first] + i]) for i in (0, 1))
            raise VLBridgeError(
                f"segment {int(segment[first])}: {self.kind} {item} with grid {self.grids[item]} needs "
                f"{end - start} placeholder tokens in a row, but after {int(seen[first]) - start} of them "
                f"context-parallel rank {int(rank[first])} holds another token. Each rank r of {cp_size} must hold "
                f"chunks r and {2 * cp_size - 1} - r of each padded segment, images and video frames uninterrupted"
            )

    def _whole_blocks(self, seen: Tensor) -> Tensor:
        """How many blocks are whole after `seen` placeholders."""
        if not self.grids:
            return torch.zeros_like(seen)
        return torch.searchsorted(self.block_bounds, seen.contiguous(), right=True) - 1

    def _found(self, segment: int, by_rank: Tensor) -> str:
        return (
            f"segment {segment}: found {int(by_rank[:, segment].sum())} {self.kind} placeholder tokens "
            f"(context-parallel ranks: {by_rank[:, segment].tolist()})"
        )

    def _sizes(self, first: int) -> list[int]:
        return self.bounds.diff()[first : first + 3].tolist()


def _bounds(sizes: Tensor) -> Tensor:
    """0, then the cumulative sums."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
