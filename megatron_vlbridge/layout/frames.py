"""Where each patch of an image or video lies in its frame.

Patches come in the order of transformers' Qwen-VL processors: frame after frame, inside a frame merge block after
merge block (`merge_size` x `merge_size` patches that become one token), inside a block row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vlbridge.errors import VLBridgeError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Frames:
    """The frames of all images and videos of a batch, from their `grids` `(frames, height, width)` in patches.

    Example: `Frames(((1, 4, 2), (2, 2, 2))).lengths` is `(8, 4, 4)`.
    """

    grids: tuple[Grid, ...]
    merge_size: int = 2

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each frame; attention in the tower stays inside a frame."""
        return tuple(height * width for frames, height, width in self.grids for _ in range(frames))

    @property
    def split_frames(self) -> tuple[Grid, ...]:
        """Each frame as a grid of its own."""
        return tuple((1, height, width) for frames, height, width in self.grids for _ in range(frames))

    @property
    def patches(self) -> int:
        """Patches of all frames."""
        return sum(frames * height * width for frames, height, width in self.grids)

    def coordinates(self, device: torch.device) -> torch.Tensor:
        """Row and column of each patch in its frame: int64 `[2, patches]`."""
        inside, _, width = self._per_patch(device)
        merge = self.merge_size
        block, corner = inside // merge**2, inside % merge**2
        blocks_per_row = width // merge
        row = block // blocks_per_row * merge + corner // merge
        column = block % blocks_per_row * merge + corner % merge
        return torch.stack((row, column))

    def table_weights(self, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """How to interpolate a `side` x `side` position table at each patch (bilinear, corners aligned).

        Gives the four table rows of each patch, int64 `[4, patches]`, and their weights, fp32 `[4, patches]`.
        Source of the formula: `get_vision_interpolation_indices_and_weights` of transformers' `vision_utils.py`.
        """
        _, height, width = self._per_patch(device)
        sizes = torch.stack((height, width))
        place = self.coordinates(device).float() * (side - 1) / (sizes - 1).clamp(min=1)
        low = place.long()
        high = (low + 1).clamp(max=side - 1)
        part = place - low
        (top, left), (bottom, right), (down, across) = low, high, part
        index = torch.stack((top * side + left, top * side + right, bottom * side + left, bottom * side + right))
        weight = torch.stack(((1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across))
        return index, weight

    def _per_patch(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each patch: its index in its frame, and the height and width of the frame."""
        sizes = torch.tensor(
            [(height * width, height, width) for frames, height, width in self.grids for _ in range(frames)]
        ).T
        starts = sizes[0].cumsum(0) - sizes[0]
        per_frame = torch.cat((starts[None], sizes[1:])).to(device, non_blocking=True)
        repeats = sizes[0].to(device, non_blocking=True)
        start, height, width = per_frame.repeat_interleave(repeats, dim=1, output_size=self.patches)
        return torch.arange(self.patches, device=device) - start, height, width


def grids_of(grid_thw: torch.Tensor | Sequence[Sequence[int]]) -> tuple[Grid, ...]:
    """Host integers of a `[n, 3]` grid table (CPU tensor or nested lists)."""
    rows = grid_thw.tolist() if isinstance(grid_thw, torch.Tensor) else grid_thw
    return tuple((int(t), int(h), int(w)) for t, h, w in rows)


def check_grids(kind: str, grid_thw: torch.Tensor, merge_size: int) -> torch.Tensor:
    """The grids of one kind ("image" or "video") as int64 `[n, 3]` (frames, height, width in patches).

    Raises VLBridgeError where they are no integers `[n, 3]`, not positive or not divisible by `merge_size`.
    """
    if grid_thw.numel() == 0:
        return torch.zeros(0, 3, dtype=torch.int64)
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
        raise VLBridgeError(f"{kind}_grid_thw: expected int64 [n, 3], found {grid_thw.dtype} {list(grid_thw.shape)}")
    grids = grid_thw.to(torch.int64)
    bad = (grids <= 0) | (grids % torch.tensor([1, merge_size, merge_size]) != 0)
    if bad.any():
        item, axis = (int(i) for i in bad.nonzero()[0])
        rule = "a positive number" + ("" if axis == 0 else f" divisible by the merge size {merge_size}")
        raise VLBridgeError(
            f"{kind} {item}: grid {tuple(grids[item].tolist())}: expected {'thw'[axis]} to be {rule}, "
            f"found {int(grids[item, axis])}"
        )
    return grids
