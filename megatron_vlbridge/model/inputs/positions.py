"""Position ids that come with a batch, which the model takes in place of those that it computes."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout


@dataclass(frozen=True)
class GivenPositions:
    """`position_ids` of a batch: int64 `[3, B, S]` (time, row, column) or `[B, S]`, on the host; of a pack B is 1.

    2-D positions say nothing about images. They must count the tokens of each segment from 0, in which case the
    computed positions are taken. Padding may have any position. `compared`: the computed ones are expected.

    Example: `given = GivenPositions.of(position_ids)`, then `inputs.with_positions(given)`.
    """

    ids: torch.Tensor
    compared: bool = False

    @classmethod
    def of(cls, ids: Any, compared: bool = False) -> Self | None:
        """From a tensor of integers on any device, or None (VLBridgeError where it is something else)."""
        if ids is None:
            return None
        if not isinstance(ids, torch.Tensor):
            raise VLBridgeError(f"position_ids: expected a tensor of integers, found {type(ids).__name__}")
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise VLBridgeError(f"position_ids: expected integers, found {ids.dtype} {list(ids.shape)}")
        return cls(ids.to("cpu", torch.int64), compared)

    def packed(self, layout: BatchLayout) -> Self:
        """Those of a padded batch, as a pack (VLBridgeError where their shape is not that of the batch)."""
        assert layout.table is not None
        self._check_shape(*layout.table)
        rows = torch.cat([layout.pack(axis, 0) for axis in self.ids.view(-1, *layout.table)])
        return replace(self, ids=rows.view(*self.ids.shape[:-2], 1, layout.total))

    def check(self, layout: BatchLayout) -> None:
        """Reject another shape than the tokens', and 2-D positions that do not count each segment's tokens from 0."""
        self._check_shape(1, layout.total // layout.cp_size)
        if self.ids.dim() == 3:
            return
        _, token = _places(layout)
        if difference := _difference(self.ids, token[None], layout):
            raise VLBridgeError(
                f"position_ids: {difference}. 2-D positions say nothing about images: only those that count the tokens "
                "of each segment from 0 are taken (padding may have any, where `lengths` or attention_mask says what "
                "is padding), and MRoPE positions are computed. Give [3, ...], or leave position_ids out"
            )

    def compare(self, computed: torch.Tensor, layout: BatchLayout) -> None:
        """If `compared`, reject positions `[3, 1, T]` that are not the `computed` ones."""
        if not self.compared or self.ids.dim() == 2:
            return
        if difference := _difference(self.ids[:, 0], computed[:, 0], layout):
            raise VLBridgeError(
                f"position_ids: {difference}, as computed from the tokens and grids (time, row, column). They are "
                "compared since check_position_ids is set; correct them, leave them out, or do not set it"
            )

    def instead_of(self, computed: torch.Tensor) -> torch.Tensor:
        """The positions to use, `[3, 1, T]`: these, or the `computed` ones where these are 2-D."""
        return self.ids if self.ids.dim() == 3 else computed

    def _check_shape(self, rows: int, tokens: int) -> None:
        if self.ids.shape not in ((3, rows, tokens), (rows, tokens)):
            raise VLBridgeError(
                f"position_ids: expected [3, {rows}, {tokens}] (time, row, column) or [{rows}, {tokens}], as there "
                f"are {rows} x {tokens} tokens, found {list(self.ids.shape)}"
            )


def _places(layout: BatchLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token that the rank holds: its segment, and its place there; int64 `[T]`, any values for padding."""
    lengths, index = torch.tensor(layout.lengths), layout.gather_index
    ends = lengths.cumsum(0)
    segment = torch.searchsorted(ends, index, right=True)
    return segment, index - (ends - lengths)[segment]


def _difference(found: torch.Tensor, expected: torch.Tensor, layout: BatchLayout) -> str:
    """The first token, without padding, where positions `[n, T]` are not the expected ones; empty if all are."""
    held = layout.gather_index >= 0
    wrong = ((found != expected).any(0) & held).nonzero().flatten()
    if not len(wrong):
        return ""
    first = int(wrong[0])
    segment, token = (int(values[first]) for values in _places(layout))
    values = [positions[:, first].tolist() for positions in (found, expected)]
    is_at, should = values if len(found) > 1 else (values[0][0], values[1][0])
    return (
        f"token {token} of segment {segment} has position {is_at}, expected {should} ({len(wrong)} of "
        f"{int(held.sum())} tokens differ)"
    )
