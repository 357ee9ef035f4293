"""What Transformer Engine is told of a pack."""

from dataclasses import fields

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_vlbridge.backends.packed import PackedSegments


def test_kernels_are_told_that_nothing_lies_between_the_segments() -> None:
    """Left open, Transformer Engine compares the bounds with and without padding on the device, in every layer."""
    packed = PackedSegments.from_lengths([4, 2, 6], torch.device("cpu"))
    assert "pad_between_seqs" in {field.name for field in fields(PackedSeqParams)}
    assert packed.pad_between_seqs is False
    for bounds, padded in (
        (packed.cu_seqlens_q, packed.cu_seqlens_q_padded),
        (packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded),
    ):
        assert torch.equal(bounds, padded)
