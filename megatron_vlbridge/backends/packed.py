"""Packed (THD) sequence parameters with the segment lengths known on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSegments(PackedSeqParams):
    """`PackedSeqParams` that also hold `segments`, the lengths as host integers.

    Under context parallelism the segments are those of the whole pack, and `pack_order` `[T]` gives each token's place
    where the ranks' tokens are concatenated.

    Transformer Engine's kernels read the `cu_seqlens` tensors, the CPU kernels `segments`. Neither syncs with the
    device.
    """

    segments: tuple[int, ...] = ()
    pack_order: torch.Tensor | None = None

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device, pack_order: torch.Tensor | None = None, **fields: Any
    ) -> Self:
        """THD parameters of consecutive segments of these `lengths` (tokens); `fields` are a subclass's own.

        Example: `PackedSegments.from_lengths([3, 2], torch.device("cpu")).cu_seqlens_q` is
        `tensor([0, 3, 5], dtype=torch.int32)`.
        """
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            # If None, Transformer Engine syncs with the device in every layer to find it out.
            pad_between_seqs=False,
            segments=tuple(lengths),
            pack_order=pack_order,
            **fields,
        )
