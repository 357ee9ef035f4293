"""MRoPE position indices of a pack: a temporal, a height and a width coordinate for every token.

The rule is that of Qwen3-VL (transformers 5.23, `Qwen3VLModel.get_rope_index`): a text token has the same index in
all three rows and the next token has one more; the tokens of an image or of one video frame count their row and
column from the index where the block begins; the token after the block continues at that index plus the longer side
of the merged grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.vision_items import VisionItems, as_int64


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

    Raises VLBridgeError, with the segment, the image or video and all counts, on: a grid that is not positive or not
    divisible by `merge_size`; placeholders of a segment that are not those of whole images or videos, or not of as
    many as the counts say; a block with another token inside; placeholders in the padding; segment lengths that are
    not positive or sum to more than the tokens.

    Example::

        >>> ids = torch.tensor([5, 9, 9, 5])  # text, an image of 1 x 2 merged tokens, text
        >>> mrope_positions(ids, [4], torch.tensor([[1, 2, 4]]), torch.empty(0, 3), image_token_id=9,
        ...                 video_token_id=8, merge_size=2).tolist()
        [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    lengths = _checked_lengths(segment_lengths, tokens)
    is_image, is_video = tokens == image_token_id, tokens == video_token_id
    images, videos = VisionItems("image", image_grid_thw, merge_size), VisionItems("video", video_grid_thw, merge_size)
    starts = (
        block_starts(images, is_image, lengths.cumsum(0), images_per_segment),
        block_starts(videos, is_video, lengths.cumsum(0), videos_per_segment),
    )
    grids = torch.cat((images.blocks, videos.blocks))
    return _steps(~(is_image | is_video), lengths, torch.cat(starts), grids)[:, :-1].cumsum(1)


def _checked_lengths(segment_lengths: Sequence[int] | Tensor, tokens: Tensor) -> Tensor:
    """The lengths as int64 `[n]`; VLBridgeError if one is not positive or if they sum to more than the tokens."""
    if tokens.dim() != 1:
        raise VLBridgeError(f"tokens: expected a pack [T], found {list(tokens.shape)}")
    lengths = as_int64(segment_lengths)
    for index, length in enumerate(lengths.tolist()):
        if length <= 0:
            raise VLBridgeError(f"segment {index}: expected a positive length, found {length}")
    if int(lengths.sum()) > tokens.numel():
        raise VLBridgeError(
            f"segment_lengths: {lengths.numel()} segments sum to {int(lengths.sum())} tokens, "
            f"but the pack has {tokens.numel()}"
        )
    return lengths


def block_starts(items: VisionItems, mask: Tensor, ends: Tensor, counts: Sequence[int] | Tensor | None) -> Tensor:
    """The index in the pack of each block's first placeholder, int64 `[B]`, after all checks.

    `mask` bool `[T]` are the placeholders, `ends` `[n]` the ends of the segments, `counts` their numbers of items.
    """
    # numpy finds them three times faster than torch; the memory is shared.
    where = torch.from_numpy(mask.numpy().nonzero()[0])
    seen = torch.searchsorted(where, ends)
    held = seen.diff(prepend=seen.new_zeros(1))[None]
    inside = int(held.sum())
    if inside != len(where):
        raise VLBridgeError(
            f"padding: {len(where) - inside} {items.kind} placeholder tokens after the last of {len(ends)} segments, "
            f"the first at token {int(where[inside])}; expected none"
        )
    items.check_segments(held)
    if counts is not None:
        items.check_counts(held, as_int64(counts))
    offset, size = items.block_bounds[:-1], items.block_bounds.diff()
    start = where[offset]
    gap = (where[offset + size - 1] - start + 1 != size).nonzero().flatten()
    if len(gap):
        block = int(gap[0])
        run = where[offset[block] : offset[block] + size[block]] - start[block]
        raise VLBridgeError(
            f"segment {int(torch.searchsorted(ends, start[block], right=True))}: {items.name(int(items.item[block]))} "
            f"needs {int(size[block])} placeholder tokens in a row from token {int(start[block])}, found "
            f"{int((run == torch.arange(len(run))).sum())}; {items.totals(held)}"
        )
    return start


def _steps(is_text: Tensor, lengths: Tensor, starts: Tensor, grids: Tensor) -> Tensor:
    """How much each coordinate grows from the token before: int64 `[3, T + 1]`, the last column beyond the pack.

    `starts` int64 `[B]` and merged `grids` `[B, 3]` are the blocks. A pack is mostly runs in which a coordinate grows
    by one or not at all; only the ends of grid lines, frames, blocks and segments differ, and those are few. Their
    running sum is the positions.
    """
    step = torch.ones(3, is_text.numel() + 1, dtype=torch.int64)
    step[:2, :-1] = is_text
    size, side = grids.prod(1), grids[:, 1:].amax(1)
    # Time and height are constant inside a block, so entering it has to count here.
    step[:2].index_add_(1, starts, torch.ones(2, len(starts), dtype=torch.int64))
    step.index_add_(1, starts + size, (side[:, None] - grids).T)
    line_start, line_step = _line_steps(starts, grids)
    step.index_add_(1, line_start, line_step)
    ends = lengths.cumsum(0)
    used = lengths.index_add(0, torch.searchsorted(ends, starts, right=True), side - size)
    step.index_add_(1, ends, -used.expand(3, -1))
    step[:, 0] -= 1
    return step


def _line_steps(starts: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Index `[R]` and steps `[3, R]` of the first token of every grid line but the first of its block."""
    lines = grids[:, 0] * grids[:, 1] - 1
    block = torch.arange(len(lines)).repeat_interleave(lines)
    line = torch.arange(len(block)) - (lines.cumsum(0) - lines)[block] + 1
    _, rows, cols = grids[block].unbind(1)
    new_frame = (line % rows == 0).to(torch.int64)
    return starts[block] + line * cols, torch.stack([new_frame, 1 - new_frame * rows, -cols])
