"""MRoPE position indices of a pack: a temporal, a height and a width coordinate for every token.

The rule is that of Qwen3-VL (transformers 5.23, `Qwen3VLModel.get_rope_index`): a text token has the same index in
all three rows and the next token has one more; the tokens of an image or of one video frame count their row and
column from the index where the block begins; the token after the block continues at that index plus the longer side
of the merged grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.frames import check_grids


def mrope_positions(
    tokens: Tensor,
    segment_lengths: Sequence[int] | Tensor,
    image_grid_thw: Tensor,
    video_grid_thw: Tensor,
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    images_per_segment: Sequence[int] | Tensor | None = None,
    videos_per_segment: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Position indices int64 `[3, T]` of a pack: rows are time, height, width; every segment starts again at 0.

    `tokens` is int64 `[T]` on the CPU, `segment_lengths` the true lengths in order; what is left after them is
    padding, counted from 0 as one more segment. `image_grid_thw` and `video_grid_thw` are int64 `[n, 3]`, in patches,
    in the order of the tokens. A video of t frames is t blocks (1, h, w) with text between. Counts per segment are
    checked where they are given.

    Raises VLBridgeError as `check_vision_tokens` does.

    Example::

        >>> ids = torch.tensor([5, 9, 9, 5])  # text, an image of 1 x 2 merged tokens, text
        >>> mrope_positions(ids, [4], torch.tensor([[1, 2, 4]]), torch.empty(0, 3), image_token_id=9,
        ...                 video_token_id=8, merge_size=2).tolist()
        [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    is_image, is_video = tokens == image_token_id, tokens == video_token_id
    lengths = segment_lengths_checked(segment_lengths, tokens.numel())
    images = _Media("image", image_grid_thw, is_image, merge_size)
    videos = _Media("video", video_grid_thw, is_video, merge_size)
    blocks = _blocks_checked(lengths.cumsum(0), (images, images_per_segment), (videos, videos_per_segment))
    return _steps(~(is_image | is_video), lengths, blocks)[:, :-1].cumsum(1)


def check_vision_tokens(
    tokens: Tensor,
    segment_lengths: Sequence[int] | Tensor,
    image_grid_thw: Tensor,
    video_grid_thw: Tensor,
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    images_per_segment: Sequence[int] | Tensor | None = None,
    videos_per_segment: Sequence[int] | Tensor | None = None,
) -> None:
    """Reject a pack whose placeholder tokens and grids do not match; arguments as for `mrope_positions`.

    Raises VLBridgeError, with the segment, the image or video and all counts, on: a grid that is not positive or not
    divisible by `merge_size`; placeholders of a segment that are not those of whole images or videos, or not of as
    many as the counts say; a block with another token inside; placeholders in the padding; segment lengths that are
    not positive or sum to more than the tokens.
    """
    lengths = segment_lengths_checked(segment_lengths, tokens.numel())
    images = _Media("image", image_grid_thw, tokens == image_token_id, merge_size)
    videos = _Media("video", video_grid_thw, tokens == video_token_id, merge_size)
    _blocks_checked(lengths.cumsum(0), (images, images_per_segment), (videos, videos_per_segment))


def segment_lengths_checked(segment_lengths: Sequence[int] | Tensor, num_tokens: int) -> Tensor:
    """The lengths as int64 `[n]`; VLBridgeError if one is not positive or if they sum to more than `num_tokens`."""
    lengths = torch.as_tensor(segment_lengths, dtype=torch.int64).flatten()
    for index, length in enumerate(lengths.tolist()):
        if length <= 0:
            raise VLBridgeError(f"segment {index}: expected a positive length, found {length}")
    if int(lengths.sum()) > num_tokens:
        raise VLBridgeError(
            f"segment_lengths: {lengths.numel()} segments sum to {int(lengths.sum())} tokens, "
            f"but the pack has {num_tokens}"
        )
    return lengths


@dataclass(frozen=True)
class _Blocks:
    """Where the images and the video frames of a pack are; one entry per block, images first, then frames.

    All fields are int64 `[B]`: `start` is the index of the block's first token in the pack, `segment` its segment, and
    `frames`, `rows`, `cols` its merged grid; the block is `frames * rows * cols` tokens without a gap.
    """

    start: Tensor
    segment: Tensor
    frames: Tensor
    rows: Tensor
    cols: Tensor


class _Media:
    """The grids of one kind ("image" or "video") beside the indices of that kind's placeholder tokens."""

    def __init__(self, kind: str, grid_thw: Tensor, mask: Tensor, merge_size: int) -> None:
        if mask.dim() != 1:
            raise VLBridgeError(f"tokens: expected a pack [T], found {list(mask.shape)}")
        self.kind = kind
        # numpy finds them three times faster than torch; the memory is shared.
        self.where = torch.from_numpy(mask.numpy().nonzero()[0])
        self.merge_size = merge_size
        self.grid = check_grids(kind, grid_thw, merge_size)
        self.merged = self.grid // torch.tensor([1, merge_size, merge_size])
        # bounds[k] is the number of placeholder tokens before item k.
        self.bounds = torch.cat([torch.zeros(1, dtype=torch.int64), self.merged.prod(1).cumsum(0)])

    def check_segments(self, segment_ends: Tensor) -> None:
        """Every segment must hold the placeholders of whole items, the padding none, and all grids must be used."""
        seen = torch.searchsorted(self.where, segment_ends)
        inside = int(seen[-1]) if seen.numel() else 0
        if inside != self.where.numel():
            raise VLBridgeError(
                f"padding: {self.where.numel() - inside} {self.kind} placeholder tokens after the last of "
                f"{segment_ends.numel()} segments, the first at token {int(self.where[inside])}; expected none"
            )
        item = torch.searchsorted(self.bounds, seen)
        fits = self.bounds[item.clamp(max=len(self.grid))] == seen
        if not fits.all():
            self._reject_segment(int((~fits).nonzero()[0, 0]), seen, item)
        if inside != int(self.bounds[-1]):
            first = int(torch.searchsorted(self.bounds, inside, right=True)) - 1
            raise VLBridgeError(
                f"{self._totals()}: {self.kind} {first} with grid {self._grid_text(first)} has no placeholders; "
                f"expected the placeholders of {len(self.grid)} {self.kind}s, found those of {first}"
            )

    def _reject_segment(self, segment: int, seen: Tensor, item: Tensor) -> None:
        before = int(seen[segment - 1]) if segment else 0
        found = int(seen[segment]) - before
        first = int(torch.searchsorted(self.bounds, before))
        if int(item[segment]) > len(self.grid):
            have = int(self.bounds[-1]) - before
            raise VLBridgeError(
                f"segment {segment}: found {found} {self.kind} placeholder tokens, but the grids left for it "
                f"({len(self.grid) - first}, from {self.kind} {first}) make {have} tokens; {self._totals()}"
            )
        cut = int(item[segment]) - 1
        need = int(self.bounds[cut + 1] - self.bounds[cut])
        part = int(seen[segment] - self.bounds[cut])
        raise VLBridgeError(
            f"segment {segment}: found {found} {self.kind} placeholder tokens; {self.kind} {cut} with grid "
            f"{self._grid_text(cut)} needs {need} tokens, "
            f"but only {part} are left for it before the segment's end; {self._totals()}"
        )

    def check_counts(self, segment_ends: Tensor, counts: Tensor) -> None:
        """Every segment must hold the placeholders of exactly the items that `counts` gives to it."""
        n = segment_ends.numel()
        if counts.numel() != n or bool((counts < 0).any()) or int(counts.sum()) != len(self.grid):
            raise VLBridgeError(
                f"{self.kind}s_per_segment: expected {n} counts >= 0 that sum to {len(self.grid)} grids, "
                f"found {counts.tolist()}"
            )
        found = torch.searchsorted(self.where, segment_ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
        last = counts.cumsum(0)
        expected = self.bounds[last] - self.bounds[last - counts]
        if not torch.equal(found, expected):
            segment = int((found != expected).nonzero()[0, 0])
            first, count = int(last[segment] - counts[segment]), int(counts[segment])
            raise VLBridgeError(
                f"segment {segment}: found {int(found[segment])} {self.kind} placeholder tokens; "
                f"its {count} {self.kind}s (from {self.kind} {first}, grids "
                f"{self.grid[first : first + count].tolist()}) make {int(expected[segment])}"
            )

    def blocks(self, segment_ends: Tensor) -> _Blocks:
        """The blocks without a gap: items, or frames of items; VLBridgeError where another token is inside one."""
        item = torch.arange(len(self.grid))
        frames, rows, cols = self.merged.unbind(1)
        if self.kind == "video":
            item = item.repeat_interleave(frames)
            rows, cols, frames = rows[item], cols[item], torch.ones_like(item)
        size = frames * rows * cols
        offset = size.cumsum(0) - size
        start = self.where[offset]
        segment = torch.searchsorted(segment_ends, start, right=True)
        gap = self.where[offset + size - 1] - start + 1 != size
        if gap.any():
            block = int(gap.nonzero()[0, 0])
            run = self.where[offset[block] : offset[block] + size[block]] - start[block]
            held = int((run == torch.arange(run.numel())).sum())
            index = int(item[block])
            raise VLBridgeError(
                f"segment {int(segment[block])}: {self.kind} {index} with grid {self._grid_text(index)} "
                f"needs {int(size[block])} placeholder tokens in a row "
                f"from token {int(start[block])}, found {held}; {self._totals()}"
            )
        return _Blocks(start, segment, frames, rows, cols)

    def _grid_text(self, item: int) -> str:
        return str(tuple(self.grid[item].tolist()))

    def _totals(self) -> str:
        return (
            f"in all {self.where.numel()} {self.kind} placeholder tokens, and {len(self.grid)} grids that make "
            f"{int(self.bounds[-1])} at merge size {self.merge_size}"
        )


def _blocks_checked(segment_ends: Tensor, *kinds: tuple[_Media, Sequence[int] | Tensor | None]) -> _Blocks:
    """The blocks of all kinds together, in no particular order, after all checks."""
    parts = []
    for media, counts in kinds:
        media.check_segments(segment_ends)
        if counts is not None:
            media.check_counts(segment_ends, torch.as_tensor(counts, dtype=torch.int64).flatten())
        if len(media.grid):
            parts.append(media.blocks(segment_ends))
    if len(parts) == 1:
        return parts[0]
    columns = ([getattr(part, field.name) for part in parts] for field in fields(_Blocks))
    return _Blocks(*(torch.cat(column) if column else torch.zeros(0, dtype=torch.int64) for column in columns))


def _steps(is_text: Tensor, lengths: Tensor, blocks: _Blocks) -> Tensor:
    """How much each coordinate grows from the token before: int64 `[3, T + 1]`, the last column beyond the pack.

    A pack is mostly runs in which a coordinate grows by one or not at all; only the ends of grid lines, frames,
    blocks and segments differ, and those are few. Their running sum is the positions.
    """
    step = torch.ones(3, is_text.numel() + 1, dtype=torch.int64)
    step[:2, :-1] = is_text
    size = blocks.frames * blocks.rows * blocks.cols
    side = torch.maximum(blocks.rows, blocks.cols)
    start, end = blocks.start, blocks.start + size
    # Time and height are constant inside a block, so entering it has to count here.
    step[:2].index_add_(1, start, torch.ones(2, start.numel(), dtype=torch.int64))
    step.index_add_(1, end, torch.stack([side - blocks.frames, side - blocks.rows, side - blocks.cols]))
    line_start, line_step = _line_steps(blocks)
    step.index_add_(1, line_start, line_step)
    used = lengths.index_add(0, blocks.segment, side - size)
    step.index_add_(1, lengths.cumsum(0), -used.expand(3, -1))
    step[:, 0] -= 1
    return step


def _line_steps(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Index `[R]` and steps `[3, R]` of the first token of every grid line but the first of its block."""
    lines = blocks.frames * blocks.rows - 1
    block = torch.arange(lines.numel()).repeat_interleave(lines)
    line = torch.arange(block.numel()) - (lines.cumsum(0) - lines)[block] + 1
    rows, cols = blocks.rows[block], blocks.cols[block]
    new_frame = (line % rows == 0).to(torch.int64)
    return blocks.start[block] + line * cols, torch.stack([new_frame, 1 - new_frame * rows, -cols])
