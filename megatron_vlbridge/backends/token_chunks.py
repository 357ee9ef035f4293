"""Where the tokens of a pack lie in chunks of one length, none of which holds tokens of two segments.

Index arithmetic on the device: shapes depend on shapes only, so nothing is read on the host.
"""

from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange


def pack_bounds(cu_seqlens: torch.Tensor | None, tokens: int, device: torch.device) -> torch.Tensor:
    """`cu_seqlens` `[S + 1]` in int64; without it, that of one segment of all `tokens`."""
    return torch.arange(2, device=device) * tokens if cu_seqlens is None else cu_seqlens.long()


def segments_of_tokens(bounds: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token, the index of its segment and its position in it, both `[T]`; `bounds` as of `pack_bounds`."""
    token = torch.arange(tokens, device=bounds.device)
    segment = torch.bucketize(token, bounds[1:], right=True)
    return segment, token - bounds[:-1][segment]


@dataclass(frozen=True)
class TokenChunks:
    """The chunks of a pack: `N` of `C` slots each. A chunk holds tokens of one segment; its last slots may be empty.

    `N` is the largest number that segments of any lengths can need, as their lengths are not read: the chunks of the
    segments come first, in order, and the remaining ones are empty.

    `token_of_slot` `[N * C]` is 0 for an empty slot, of which `is_empty` `[N * C]` is true. `slot_of_token` `[T]`.
    `begins` `[N]` is true for the first chunk of a segment.
    """

    token_of_slot: torch.Tensor
    is_empty: torch.Tensor
    slot_of_token: torch.Tensor
    begins: torch.Tensor

    @classmethod
    def from_bounds(cls, bounds: torch.Tensor, tokens: int, length: int) -> Self:
        """The chunks of `length` slots of a pack of `tokens`; `bounds` `[S + 1]` as of `pack_bounds`.

        Example:
            >>> chunks = TokenChunks.from_bounds(torch.tensor([0, 3, 4]), 4, length=2)
            >>> chunks.slot_of_token, chunks.begins
            (tensor([0, 1, 2, 4]), tensor([ True, False,  True]))
        """
        device, segments = bounds.device, len(bounds) - 1
        count = (tokens + (length - 1) * segments) // length
        needed = (bounds.diff() + length - 1) // length
        ends = needed.cumsum(0)
        segment, position = segments_of_tokens(bounds, tokens)
        slot_of_token = (ends - needed)[segment] * length + position
        token_of_slot = torch.zeros(count * length, dtype=torch.int64, device=device)
        is_empty = torch.ones(count * length, dtype=torch.bool, device=device)
        owner = torch.bucketize(torch.arange(count, device=device), ends, right=True)
        return cls(
            token_of_slot=token_of_slot.scatter(0, slot_of_token, torch.arange(tokens, device=device)),
            is_empty=is_empty.scatter(0, slot_of_token, False),
            slot_of_token=slot_of_token,
            begins=owner.diff(prepend=owner.new_full((1,), -1)) != 0,
        )

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, H, ...]` by tokens as `[N, B * H, C, ...]` by chunks, zero in empty slots."""
        empty = self.is_empty.view(1, -1, *[1] * (x.dim() - 2))
        slots = x.index_select(1, self.token_of_slot).masked_fill(empty, 0)
        return rearrange(slots, "b (n c) h ... -> n (b h) c ...", n=len(self.begins))

    def join(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """`[N, B * H, C, d]` by chunks as `[B, T, H, d]` by tokens."""
        return rearrange(x, "n (b h) c d -> b (n c) h d", b=batch).index_select(1, self.slot_of_token)
