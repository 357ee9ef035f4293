"""Where each token of a batch lives: every batch is one row of segments, one behind the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_vlbridge.errors import VLBridgeError


@dataclass(frozen=True)
class BatchLayout:
    """Segments (conversations) of true `lengths` in one row of `total` tokens; the rest of the row is padding.

    `rows` is set where the batch came as a padded `[B, S]` table: the place of each packed token in the table.

    Example:
        >>> BatchLayout.packed([3, 2], total=8).segments
        (3, 2, 3)
    """

    lengths: tuple[int, ...]
    total: int
    table: tuple[int, int] | None = None
    rows: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def packed(cls, lengths: Sequence[int], total: int) -> "BatchLayout":
        """The layout of a row of `total` tokens that already holds segments of these `lengths`.

        Raises:
            VLBridgeError: where a length is not positive, or the lengths exceed `total`.
        """
        lengths = tuple(int(length) for length in lengths)
        for segment, length in enumerate(lengths):
            if length < 1:
                raise VLBridgeError(f"segment {segment} of the pack has length {length}; every segment needs a token")
        if not lengths or sum(lengths) > total:
            raise VLBridgeError(
                f"{len(lengths)} segments of together {sum(lengths)} tokens do not fit a pack of {total} tokens; "
                f"lengths: {list(lengths)}"
            )
        return cls(lengths, total)

    @classmethod
    def from_padded(cls, attention_mask: torch.Tensor, multiple_of: int = 1) -> "BatchLayout":
        """The layout of a padded `[B, S]` batch; `attention_mask` is 1 (keep) or 0 (padding), on any side.

        `total` is rounded up to `multiple_of` (the tensor-parallel size under sequence parallelism).

        Raises:
            VLBridgeError: where the mask is not `[B, S]` of 0 and 1, or a sample has no token.
        """
        if attention_mask.dim() != 2 or not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
            raise VLBridgeError(
                "attention_mask must be [B, S] with 1 for a token and 0 for padding, "
                f"found shape {tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        lengths = mask.sum(1).tolist()
        total = -(-sum(lengths) // multiple_of) * multiple_of
        layout = cls.packed(lengths, max(total, 1))
        rows = mask.flatten().nonzero().flatten()
        return cls(layout.lengths, layout.total, (attention_mask.shape[0], attention_mask.shape[1]), rows)

    @property
    def padding(self) -> int:
        """How many tokens at the end of the row are padding."""
        return self.total - sum(self.lengths)

    @property
    def segments(self) -> tuple[int, ...]:
        """The lengths that attention sees: each conversation, and the padding as a segment of its own."""
        return (*self.lengths, self.padding) if self.padding else self.lengths

    def pack(self, table: torch.Tensor, fill: float) -> torch.Tensor:
        """`[B, S]` -> `[1, total]`, padding filled with `fill`."""
        if self.rows is None or table.shape != self.table:
            raise VLBridgeError(f"the layout packs a batch of shape {self.table}, found {tuple(table.shape)}")
        packed = table.new_full((1, self.total), fill)
        packed[0, : len(self.rows)] = table.flatten()[self.rows.to(table.device)]
        return packed

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[1, total, ...]` -> `[B, S, ...]`, zeros where the batch was padded."""
        if self.rows is None or self.table is None:
            raise VLBridgeError("the batch came as a pack, there is no [B, S] table to unpack it to")
        table = packed.new_zeros((self.table[0] * self.table[1], *packed.shape[2:]))
        table = table.index_copy(0, self.rows.to(packed.device), packed[0, : len(self.rows)])
        return table.unflatten(0, self.table)
