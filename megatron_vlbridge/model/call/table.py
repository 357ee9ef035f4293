"""Rows `[B, S]` that become the segments of one packed batch."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import gather
from megatron_vlbridge.model.inputs.positions import GivenPositions
from megatron_vlbridge.model.inputs.thd_batch import Integers, integers


@dataclass(frozen=True)
class Table:
    """Where the tokens of rows `[B, S]` are in a packed batch, whose segment b is row b.

    `cu_seqlens` `[B + 1]` are the segments' bounds with padding, `lengths` `[B]` their lengths without. `index` int64
    `[T]`: of each token of the pack its place in the flattened rows, -1 where it is padding.

    Example: `Table.of_rows(torch.tensor([[True, False], [True, True]])).index` is `tensor([0, -1, 2, 3])`.
    """

    shape: tuple[int, int]
    cu_seqlens: tuple[int, ...]
    lengths: tuple[int, ...]
    index: torch.Tensor

    @classmethod
    def of_rows(cls, mask: torch.Tensor) -> Self:
        """The rows as they are, one after the other: for context parallelism, whose ranks get a part of each row.

        Raises VLBridgeError where a row of `mask`, bool `[B, S]`, has padding elsewhere than at its end.
        """
        size, width = mask.shape
        lengths = mask.sum(1)
        wrong = (mask != (torch.arange(width) < lengths[:, None])).any(1).nonzero().flatten()
        if len(wrong):
            raise VLBridgeError(
                f"attention_mask, row {int(wrong[0])}: context parallelism splits padded rows "
                "[B, S] whose padding is at the end, found text after padding. Pad on the right, or give "
                "packed_seq_params beside the mask"
            )
        index = torch.arange(size * width).masked_fill(~mask.flatten(), -1)
        return cls((size, width), tuple(range(0, (size + 1) * width, width)), tuple(lengths.tolist()), index)

    @classmethod
    def in_segments(cls, mask: torch.Tensor, cu_seqlens: Integers, lengths: Integers | None) -> Self:
        """The tokens that `mask`, bool `[B, S]`, keeps, in the segments of `cu_seqlens`; padding may be on any side.

        Without `lengths` the mask says what is padding; with them, it may also keep a segment's padding.

        Raises VLBridgeError where the mask and the segments do not match.
        """
        bounds, kept = integers(cu_seqlens), mask.sum(1).tolist()
        true = tuple(kept) if lengths is None else integers(lengths)
        if len(bounds) != len(kept) + 1 or len(true) != len(kept):
            raise VLBridgeError(
                f"attention_mask has {len(kept)} rows, but cu_seqlens has {len(bounds) - 1} segments; expected a row "
                "for each. Leave attention_mask out where input_ids are already packed"
            )
        index = torch.full((max(bounds[-1], 0),), -1)
        for row, (start, end, tokens, length) in enumerate(zip(bounds, bounds[1:], kept, true, strict=False)):
            if not 0 < length <= tokens <= end - start:
                raise VLBridgeError(
                    f"attention_mask, row {row}: it keeps {tokens} tokens, but cu_seqlens gives its segment {length} "
                    f"tokens, {end - start} with padding; both must be of the same batch"
                )
            index[start : start + length] = mask[row].nonzero().flatten()[:length] + row * mask.shape[1]
        return cls((mask.shape[0], mask.shape[1]), bounds, true, index)

    def row(self, table: torch.Tensor, fill: float) -> torch.Tensor:
        """`[..., B, S]` -> `[..., 1, T]`, padding filled with `fill`; anything of another shape is left as it is."""
        if table.shape[-2:] != self.shape:
            return table
        return gather(table.flatten(-2), self.index, fill)[..., None, :]

    def positions(self, given: GivenPositions | None) -> GivenPositions | None:
        """Those of the packed batch, from those of the rows."""
        return given and replace(given, ids=self.row(given.ids, 0))


def keep_mask(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor | None:
    """Which tokens of `input_ids` `[B, S]` are text: bool `[B, S]`, from a mask in transformers' or Megatron's form.

    A mask `[B, S]` is True or 1 at text, one of Megatron's attention, `[B, 1, 1, S]`, is True at padding.

    Raises VLBridgeError for a mask of another form.
    """
    if attention_mask is None:
        return None
    mask = attention_mask.cpu()
    if mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        mask = ~mask[:, 0, 0]
    if mask.shape != input_ids.shape or input_ids.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        raise VLBridgeError(
            f"attention_mask: expected {list(input_ids.shape)} as input_ids, 1 or True at text and 0 or False at "
            f"padding, or Megatron's bool [B, 1, 1, S] that is True at padding, found {attention_mask.dtype} "
            f"{list(attention_mask.shape)}"
        )
    return mask.bool()
