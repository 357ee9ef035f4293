"""Which tokens of a pack a context-parallel rank holds.

Every segment is split into 2 * cp_size chunks of equal length; rank r holds chunks r and 2 * cp_size - 1 - r, so that
under causal attention all ranks do the same work. Source: Transformer Engine's `thd_get_partitioned_indices`.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from megatron_vlbridge.errors import VLBridgeError


@lru_cache(maxsize=64)
def zigzag_index(segments: tuple[int, ...], cp_size: int, cp_rank: int) -> torch.Tensor:
    """The places in the pack of this rank's tokens, in its order: int64 `[sum(segments) / cp_size]`, on the CPU.

    Raises VLBridgeError where a segment's (padded) length is no multiple of 2 * cp_size.
    Example: `zigzag_index((4, 8), cp_size=2, cp_rank=0)` is `tensor([ 0,  3,  4,  5, 10, 11])`.
    """
    check_divisible(segments, cp_size)
    lengths = torch.tensor(segments)
    offsets, chunk = chunks(lengths, cp_size, cp_rank)
    starts = lengths.cumsum(0) - lengths
    sizes = chunk[:, None].expand(offsets.shape)
    return concat_aranges((starts[:, None] + offsets).flatten(), sizes.flatten(), sum(segments) // cp_size)


@lru_cache(maxsize=16)
def pack_order(segments: tuple[int, ...], cp_size: int) -> torch.Tensor:
    """Where each token of the pack is when the ranks' tokens are concatenated: int64 `[T]`."""
    check_divisible(segments, cp_size)
    lengths = torch.tensor(segments)
    chunk, starts = lengths // (2 * cp_size), (lengths.cumsum(0) - lengths) // cp_size
    # Of each segment a rank holds a chunk of the first half, in rank order, and then one of the second half.
    ranks = torch.arange(cp_size) * (sum(segments) // cp_size)
    firsts = torch.cat((starts[:, None] + ranks, (starts + chunk)[:, None] + ranks.flip(0)), dim=1)
    sizes = chunk[:, None].expand(firsts.shape)
    return concat_aranges(firsts.flatten(), sizes.flatten(), sum(segments))


def chunks(lengths: torch.Tensor, cp_size: int, cp_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where this rank's two chunks of each segment begin in it, int64 `[n, 2]`, and how long each is, int64 `[n]`."""
    chunk = lengths // (2 * cp_size)
    return chunk[:, None] * torch.tensor([cp_rank, 2 * cp_size - 1 - cp_rank]), chunk


def concat_aranges(firsts: torch.Tensor, sizes: torch.Tensor, total: int | None = None) -> torch.Tensor:
    """The ranges `firsts[i] .. firsts[i] + sizes[i] - 1`, concatenated: `[sum(sizes)]`.

    On the device of its arguments; with `total`, the sum of the sizes, there is no sync.

    Example: `concat_aranges(torch.tensor([7, 0]), torch.tensor([2, 3]))` is `tensor([7, 8, 0, 1, 2])`.
    """
    before = sizes.cumsum(0) - sizes
    shifts = (firsts - before).repeat_interleave(sizes, output_size=total)
    return shifts.add_(torch.arange(len(shifts), device=shifts.device))


def check_divisible(segments: Sequence[int], cp_size: int) -> None:
    """Reject segments that context parallelism cannot split, naming the first (VLBridgeError)."""
    for segment, length in enumerate(segments):
        if length % (2 * cp_size):
            raise VLBridgeError(
                f"segment {segment} has {length} tokens with its padding, but context parallelism of size {cp_size} "
                f"needs a multiple of {2 * cp_size}; see BatchLayout.context_parallel"
            )
