"""Where each token of a batch lives: every batch is one sequence of consecutive segments."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.zigzag import chunks, concat_aranges


@dataclass(frozen=True)
class BatchLayout:
    """Segments (conversations) of true `lengths` in a pack of `total` tokens; the rest is padding.

    Under context parallelism each segment is padded at its end to a multiple of 2 * `cp_size`, and this rank holds the
    tokens that `zigzag_index` gives it. `table_index` is set where the batch came as a padded `[B, S]` table: the place
    of each packed token in it.

    Example: `BatchLayout.packed([3, 2], total=8).segments` is `(3, 2, 3)`.
    """

    lengths: tuple[int, ...]
    total: int
    cp_size: int = 1
    cp_rank: int = 0
    table: tuple[int, int] | None = None
    table_index: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def packed(cls, lengths: Sequence[int], total: int) -> "BatchLayout":
        """The layout of a row of `total` tokens that already holds segments of these `lengths`.

        Raises VLBridgeError where a length is not positive, or the lengths exceed `total`.
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

        Raises VLBridgeError where the mask is not `[B, S]` of 0 and 1, or a sample has no token.
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
        table_index = mask.flatten().nonzero().flatten()
        return cls(layout.lengths, layout.total, 1, 0, (attention_mask.shape[0], attention_mask.shape[1]), table_index)

    def context_parallel(self, cp_size: int, cp_rank: int) -> "BatchLayout":
        """The same segments, spread over `cp_size` ranks.

        Raises VLBridgeError where the padded segments do not fit the pack, or it cannot be split.
        """
        spread = replace(self, cp_size=cp_size, cp_rank=cp_rank)
        if sum(spread.padded_lengths) > self.total or self.total % (2 * cp_size):
            raise VLBridgeError(
                f"context parallelism of size {cp_size} pads each of {len(self.lengths)} segments to a multiple of "
                f"{2 * cp_size}, together {sum(spread.padded_lengths)} tokens, but the pack has {self.total} tokens, "
                f"which must be as many and a multiple of {2 * cp_size}. Pack with multiple_of={2 * cp_size} "
                "(PackedConversations), or use a longer or rounder sequence length"
            )
        return spread

    @property
    def padded_lengths(self) -> tuple[int, ...]:
        """Each conversation's length with the padding at its end."""
        if self.cp_size == 1:
            return self.lengths
        return tuple(-(-length // (2 * self.cp_size)) * 2 * self.cp_size for length in self.lengths)

    @property
    def gather_index(self) -> torch.Tensor:
        """Of each token that this rank holds, its place in the pack without padding, -1 where it is padding.

        int64 `[total / cp_size]`, on the CPU. The one index by which everything with an axis of tokens is gathered.
        """
        index = torch.full((self.total // self.cp_size,), -1)
        if self.cp_size == 1:
            used = sum(self.lengths)
            index[:used] = torch.arange(used)
            return index
        lengths = torch.tensor(self.lengths)
        offsets, chunk = chunks(torch.tensor(self.padded_lengths), self.cp_size, self.cp_rank)
        firsts = (lengths.cumsum(0) - lengths)[:, None] + offsets
        held = (lengths[:, None] - offsets).clamp(min=0).minimum(chunk[:, None])
        ends = chunk.repeat_interleave(2).cumsum(0).view(-1, 2)
        index[: int(ends[-1, -1])] = concat_aranges(firsts.flatten(), chunk.repeat_interleave(2))
        missing = chunk[:, None] - held
        index[concat_aranges((ends - missing).flatten(), missing.flatten())] = -1
        return index

    @property
    def padding(self) -> int:
        """How many tokens at the end of the row are padding."""
        return self.total - sum(self.padded_lengths)

    @property
    def segments(self) -> tuple[int, ...]:
        """The lengths that attention sees: each padded conversation, and the padding as a segment of its own."""
        return (*self.padded_lengths, self.padding) if self.padding else self.padded_lengths

    def pack(self, table: torch.Tensor, fill: float) -> torch.Tensor:
        """`[B, S]` -> `[1, total]`, padding filled with `fill`."""
        if self.table_index is None or table.shape != self.table:
            raise VLBridgeError(f"the layout packs a batch of shape {self.table}, found {tuple(table.shape)}")
        packed = table.new_full((1, self.total), fill)
        packed[0, : len(self.table_index)] = table.flatten()[self.table_index.to(table.device)]
        return packed

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[1, total, ...]` -> `[B, S, ...]`, zeros where the batch was padded."""
        if self.table_index is None or self.table is None:
            raise VLBridgeError("the batch came as a pack, there is no [B, S] table to unpack it to")
        table = packed.new_zeros((self.table[0] * self.table[1], *packed.shape[2:]))
        table = table.index_copy(0, self.table_index.to(packed.device), packed[0, : len(self.table_index)])
        return table.unflatten(0, self.table)


def gather(row: torch.Tensor, index: torch.Tensor, fill: float) -> torch.Tensor:
    """`row` `[..., T]` at `index` `[t]`, a layout's `gather_index`; `fill` where that is -1."""
    return row[..., index.clamp(min=0)].masked_fill(index < 0, fill)


def select(places: torch.Tensor, index: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of `places` `[n]` in a pack of `total` tokens `index` holds: where in it, and the item of `places`."""
    item = torch.full((total,), -1)
    item[places] = torch.arange(len(places))
    mine = gather(item, index, -1)
    found = (mine >= 0).nonzero().flatten()
    return found, mine[found]
