"""Which tokens of a pack a context-parallel rank holds.

Every segment is cut in 2 * cp_size chunks of equal length; rank r holds chunks r and 2 * cp_size - 1 - r, so that under
causal attention all ranks work the same. Source: Transformer Engine's THD layout (`thd_get_partitioned_indices`).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from megatron_vlbridge.errors import VLBridgeError


@lru_cache(maxsize=64)
def zigzag_index(segments: tuple[int, ...], cp_size: int, cp_rank: int) -> torch.Tensor:
    """The places in the pack of this rank's tokens, in its order: int64 `[sum(segments) / cp_size]`, on the CPU.

    Raises:
        VLBridgeError: where a segment's (padded) length is no multiple of 2 * cp_size.

    Example:
        >>> zigzag_index((4, 8), cp_size=2, cp_rank=0)
        tensor([ 0,  3,  4,  5, 10, 11])
    """
    check_divisible(segments, cp_size)
    chunk = torch.tensor(segments) // (2 * cp_size)
    starts = torch.tensor(segments).cumsum(0) - torch.tensor(segments)
    # Each segment gives two runs of `chunk` tokens; this rank's token i of a run is its first plus i.
    firsts = torch.stack((starts + cp_rank * chunk, starts + (2 * cp_size - 1 - cp_rank) * chunk), dim=1).flatten()
    sizes = chunk.repeat_interleave(2)
    total = int(sizes.sum())
    before = sizes.cumsum(0) - sizes
    return torch.arange(total) + (firsts - before).repeat_interleave(sizes, output_size=total)


@lru_cache(maxsize=16)
def pack_order(segments: tuple[int, ...], cp_size: int) -> torch.Tensor:
    """Where each token of the pack is when the ranks' tokens stand one rank behind the other: int64 `[T]`."""
    gathered = torch.cat([zigzag_index(segments, cp_size, rank) for rank in range(cp_size)])
    order = torch.empty_like(gathered)
    order[gathered] = torch.arange(len(gathered))
    return order


def check_divisible(segments: Sequence[int], cp_size: int) -> None:
    """Refuse segments that context parallelism cannot cut, naming the first (VLBridgeError)."""
    for number, length in enumerate(segments):
        if length % (2 * cp_size):
            raise VLBridgeError(
                f"segment {number} has {length} tokens with its padding, but context parallelism of size {cp_size} "
                f"needs a multiple of {2 * cp_size}; see BatchLayout.context_parallel"
            )
