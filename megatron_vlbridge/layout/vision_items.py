"""The images or the videos of a pack, and how many placeholder tokens each segment must hold of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.frames import check_grids


class VisionItems:
    """The items of one kind ("image" or "video"), from their grids; their placeholders are indexed from 0.

    A block is what has its placeholders in a row: an image, or one frame of a video. `blocks` int64 `[B, 3]` are the
    merged grids of all blocks, `item` `[B]` the item of each; `bounds[k]` and `block_bounds[k]` count the placeholders
    before item k and before block k.

    Raises VLBridgeError: a grid is invalid (see `check_grids`).
    """

    def __init__(self, kind: str, grid_thw: Tensor, merge_size: int) -> None:
        self.kind, self.merge_size = kind, merge_size
        self.grids = check_grids(kind, grid_thw, merge_size)
        merged = self.grids // torch.tensor([1, merge_size, merge_size])
        self.bounds = cumulative(merged.prod(1))
        self.item = torch.arange(len(merged))
        if kind == "video":
            self.item = self.item.repeat_interleave(merged[:, 0])
            merged = merged[self.item]
            merged[:, 0] = 1
        self.blocks = merged
        self.block_bounds = cumulative(merged.prod(1))

    def check_segments(self, held: Tensor) -> None:
        """Reject `held` `[ranks, segments]` placeholders that are not those of whole items, and unused items."""
        ends = held.sum(0).cumsum(0)
        item = torch.searchsorted(self.bounds, ends)
        fits = self.bounds[item.clamp(max=len(self.grids))] == ends
        if not fits.all():
            segment = int((~fits).nonzero()[0, 0])
            before, cut = int(ends[segment]) - int(held[:, segment].sum()), int(item[segment]) - 1
            if cut < len(self.grids):
                need, rest = int(self.bounds[cut + 1] - self.bounds[cut]), int(ends[segment] - self.bounds[cut])
                text = f"{self.name(cut)} needs {need} tokens, but only {rest} are left for it before the segment's end"
            else:
                first = int(torch.searchsorted(self.bounds, before))
                text = (
                    f"the grids left for it ({len(self.grids) - first}, from {self.kind} {first}) make "
                    f"{int(self.bounds[-1]) - before} tokens"
                )
            raise VLBridgeError(f"{self._found(segment, held)}; {text}; {self.totals(held)}")
        used = int(held.sum())
        if used != int(self.bounds[-1]):
            first = int(torch.searchsorted(self.bounds, used, right=True)) - 1
            raise VLBridgeError(
                f"{self.name(first)} has no placeholders: expected those of {len(self.grids)} {self.kind}s, found "
                f"those of {first}; {self.totals(held)}. Leave out grids and patches of {self.kind}s that are not in "
                "the pack"
            )

    def check_counts(self, held: Tensor, counts: Tensor) -> None:
        """Reject segments that do not hold (see `check_segments`) the placeholders of as many items as `counts` says.

        Call it after `check_segments`.
        """
        segments = held.shape[1]
        if counts.numel() != segments or bool((counts < 0).any()) or int(counts.sum()) != len(self.grids):
            raise VLBridgeError(
                f"{self.kind}s_per_segment: expected {segments} counts >= 0 that sum to {len(self.grids)} grids, "
                f"found {counts.tolist()}"
            )
        last = counts.cumsum(0)
        expected = self.bounds[last] - self.bounds[last - counts]
        wrong = (held.sum(0) != expected).nonzero().flatten()
        if len(wrong):
            segment = int(wrong[0])
            first, count = int(last[segment] - counts[segment]), int(counts[segment])
            raise VLBridgeError(
                f"{self._found(segment, held)}; its {count} {self.kind}s (from {self.kind} {first}, grids "
                f"{self.grids[first : first + count].tolist()}) make {int(expected[segment])}"
            )

    def name(self, item: int) -> str:
        """An item in an error."""
        return f"{self.kind} {item} with grid {tuple(self.grids[item].tolist())}"

    def totals(self, held: Tensor) -> str:
        """Placeholders and grids of the whole pack, for errors."""
        ranks = f" (context-parallel ranks: {held.sum(1).tolist()})" if len(held) > 1 else ""
        same = ". Give every rank all grids of the pack in order" if len(held) > 1 else ""
        return (
            f"in all {int(held.sum())} {self.kind} placeholder tokens{ranks}, and {len(self.grids)} grids that make "
            f"{int(self.bounds[-1])} at merge size {self.merge_size}{same}"
        )

    def _found(self, segment: int, held: Tensor) -> str:
        ranks = f" (context-parallel ranks: {held[:, segment].tolist()})" if len(held) > 1 else ""
        return f"segment {segment}: found {int(held[:, segment].sum())} {self.kind} placeholder tokens{ranks}"


def as_int64(values: Sequence[int] | Tensor) -> Tensor:
    """Integers as int64 `[n]`."""
    return torch.as_tensor(values, dtype=torch.int64).flatten()


def cumulative(sizes: Tensor) -> Tensor:
    """0, then the cumulative sums: int64 `[n + 1]`."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
