"""A packed (THD) batch as a framework passes it, and where its segments end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.inputs.media import Media
from megatron_vlbridge.model.inputs.positions import GivenPositions

Integers = Sequence[int] | torch.Tensor


@dataclass(frozen=True)
class ThdBatch:
    """A packed batch: the tokens of the whole pack, or this context-parallel rank's zigzag part of it.

    `tokens` int64 `[1, T]`; `labels` `[1, T]` next tokens, -100 where no loss. `cu_seqlens` (of the whole pack, padding
    included) starts with 0 and ends with the pack's length; `lengths` are the segments' true lengths, by default the
    padded ones: padding at a segment's end is then taken for text, which changes no logits and no loss, since attention
    is causal and it has no label. `positions` are those of `tokens`, computed where None. All on the host.
    """

    tokens: torch.Tensor
    cu_seqlens: Integers
    media: Media = field(default_factory=Media)
    labels: torch.Tensor | None = None
    lengths: Integers | None = None
    positions: GivenPositions | None = None

    def segments(self) -> tuple[int, ...]:
        """The segments' lengths with padding (VLBridgeError where `cu_seqlens` is invalid)."""
        bounds = integers(self.cu_seqlens)
        if len(bounds) < 2 or bounds[0] != 0:
            raise VLBridgeError(
                "cu_seqlens holds 0 and then the end of each segment in the whole pack, padding included; "
                f"found {bounds}"
            )
        for segment, (start, end) in enumerate(pairwise(bounds)):
            if end <= start:
                raise VLBridgeError(
                    f"cu_seqlens: segment {segment} begins at {start} and ends at {end}; every segment needs a token "
                    "and begins where the one before it ends. Leave out repeated entries"
                )
        return tuple(end - start for start, end in pairwise(bounds))

    def true_lengths(self, segments: tuple[int, ...]) -> tuple[int, ...]:
        """The lengths without padding of these `segments` (VLBridgeError where `lengths` do not match them)."""
        if self.lengths is None:
            return segments
        found = integers(self.lengths)
        if len(found) != len(segments):
            raise VLBridgeError(f"lengths: expected one for each of the {len(segments)} segments, found {len(found)}")
        for segment, (length, padded) in enumerate(zip(found, segments, strict=True)):
            if not 1 <= length <= padded:
                raise VLBridgeError(
                    f"lengths: segment {segment} has {length} tokens without padding; cu_seqlens gives it {padded}, "
                    f"so 1 to {padded} are expected"
                )
        return found


def integers(values: Integers) -> tuple[int, ...]:
    """Integers `[n]` on the host."""
    if isinstance(values, torch.Tensor):
        if values.dim() != 1 or values.is_floating_point():
            raise VLBridgeError(
                "cu_seqlens, lengths and counts per segment are integers [n], "
                f"found {values.dtype} {list(values.shape)}"
            )
        values = values.tolist()
    return tuple(int(value) for value in values)


def bounds_of(params: PackedSeqParams) -> tuple[Integers, Integers | None]:
    """`cu_seqlens` with padding, and the lengths without where Megatron's parameters of a pack distinguish them."""
    if params.cu_seqlens_q is None:
        raise VLBridgeError("packed_seq_params has no cu_seqlens_q; a packed batch needs where its segments end")
    padded = params.cu_seqlens_q_padded
    # Some frameworks give the padded ones as both.
    if padded is None or padded.tolist() == params.cu_seqlens_q.tolist():
        return params.cu_seqlens_q, None
    return padded, params.cu_seqlens_q.diff()
