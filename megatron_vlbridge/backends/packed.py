"""Packed (THD) sequence parameters with the segment lengths known on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSegments(PackedSeqParams):
    """`PackedSeqParams` that also holds `segments`, the lengths as host integers.

    Under context parallelism the segments are those of the whole pack, and `pack_order` `[T]` says where each token of
    the pack is when the ranks' tokens stand one rank behind the other.

    `vision_rows` [n]: the rows of this rank's hidden states that hold picture tokens, where layers add deepstack
    features to them.

    Transformer Engine's kernels read the `cu_seqlens` tensors; the CPU kernels read `segments`. Neither asks the
    device for a number.
    """

    segments: tuple[int, ...] = ()
    pack_order: torch.Tensor | None = None
    vision_rows: torch.Tensor | None = None


def packed_segments(
    lengths: Sequence[int],
    device: torch.device,
    pack_order: torch.Tensor | None = None,
    vision_rows: torch.Tensor | None = None,
) -> PackedSegments:
    """THD parameters of a row that holds segments of these `lengths` (tokens) one behind the other.

    Example:
        >>> packed_segments([3, 2], torch.device("cpu")).cu_seqlens_q
        tensor([0, 3, 5], dtype=torch.int32)
    """
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    return PackedSegments(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        # Left open, Transformer Engine waits for the device in every layer to find it out.
        pad_between_seqs=False,
        segments=tuple(lengths),
        pack_order=pack_order,
        vision_rows=vision_rows,
    )
