"""Reference kernels for the CPU, as a Megatron-Core `BackendSpecProvider`."""

from functools import partial
from itertools import groupby
from typing import Any

import torch
from einops import rearrange
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from megatron_vlbridge.backends.packed import PackedSegments
from megatron_vlbridge.errors import VLBridgeError


class CpuSpecProvider(BackendSpecProvider):
    """Megatron's own linears with the reference norms and packed attention of this module."""

    def column_parallel_linear(self) -> type:
        """Megatron's column-parallel linear."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Megatron's row-parallel linear."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Norm and linear are two modules here."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """There is no fused module."""
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """The builder of the reference norm; `config.normalization` says which one."""
        return reference_norm

    def core_attention(self) -> type:
        """The reference attention over packed segments."""
        return PackedAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Experts one after the other."""
        return partial(
            SequentialMLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        )

    def activation_func(self) -> None:
        """The activation is `config.activation_func`."""
        return


def reference_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> torch.nn.Module:
    """RMSNorm (zero-centered or not) or LayerNorm; parameters say whether their gradient is partial on each TP rank.

    Megatron adds up the gradients of parameters marked `sequence_parallel` over the tensor-parallel group.
    """
    kinds: dict[tuple[str, bool], type[torch.nn.Module]] = {
        ("RMSNorm", False): torch.nn.RMSNorm,
        ("RMSNorm", True): ZeroCenteredRMSNorm,
        ("LayerNorm", False): torch.nn.LayerNorm,
    }
    kind = config.normalization, config.layernorm_zero_centered_gamma
    if kind not in kinds:
        raise VLBridgeError(
            f"CPU backend: no norm for (normalization, layernorm_zero_centered_gamma)={kind}; "
            f"supported: {', '.join(map(str, kinds))}"
        )
    norm = kinds[kind](hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class ZeroCenteredRMSNorm(torch.nn.Module):
    """RMSNorm whose factor is `1 + weight`, in fp32; returned in the dtype of its input."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]`."""
        weight = 1.0 + self.weight.float()
        return torch.nn.functional.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class PackedAttention(torch.nn.Module):
    """Attention inside each segment of a pack: causal or bidirectional, with grouped key and value heads.

    Takes `query` `[T, heads, dim]`, `key` and `value` `[T, groups, dim]`; gives `[T, heads * dim]`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise VLBridgeError(f"CPU backend: attention_dropout must be 0, found {config.attention_dropout}")
        self.softmax_scale = softmax_scale
        self.cp_group = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                raise VLBridgeError("CPU backend: attention over context-parallel ranks needs their process group")
            self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend inside the segments of `packed_seq_params`."""
        if (
            attention_mask is not None
            or attention_bias is not None
            or not isinstance(packed_seq_params, PackedSegments)
        ):
            raise VLBridgeError("CPU backend: attention takes a pack (PackedSegments), no mask and no bias")
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise VLBridgeError(f"CPU backend: attention is causal or bidirectional, found {attn_mask_type}")
        ranks = 1 if self.cp_group is None else self.cp_group.size()
        if sum(packed_seq_params.segments) != query.shape[0] * ranks:
            raise VLBridgeError(
                f"CPU backend: segments hold {sum(packed_seq_params.segments)} tokens, "
                f"the pack {query.shape[0]} on each of {ranks} context-parallel ranks"
            )
        if self.cp_group is not None:
            return self._attend_to_all_ranks(query, key, value, attn_mask_type, packed_seq_params)
        outputs, start = [], 0
        for length, run in groupby(packed_seq_params.segments):
            stop = start + length * len(list(run))
            # Adjacent segments of one length are a batch.
            q, k, v = (rearrange(x[start:stop], "(n l) h d -> n h l d", l=length) for x in (query, key, value))
            attended = scaled_dot_product_attention(
                q, k, v, is_causal=attn_mask_type == AttnMaskType.causal, scale=self.softmax_scale, enable_gqa=True
            )
            outputs.append(rearrange(attended, "n h l d -> (n l) (h d)"))
            start = stop
        return torch.cat(outputs)

    def _attend_to_all_ranks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask_type: AttnMaskType,
        packed: PackedSegments,
    ) -> torch.Tensor:
        """Causal attention of this rank's chunks of each segment to the keys and values of all ranks.

        Keys and values are gathered, and their gradients summed back to the rank that holds them.
        """
        if attn_mask_type != AttnMaskType.causal or packed.pack_order is None or self.cp_group is None:
            raise VLBridgeError(
                "CPU backend: attention over context-parallel ranks is causal and needs the pack's order"
            )
        size, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)[packed.pack_order]
            for x in (key, value)
        )
        outputs, mine, start = [], 0, 0
        for length in packed.segments:
            chunk = length // (2 * size)
            for index in (rank, 2 * size - 1 - rank):
                seen = (index + 1) * chunk
                q, k, v = (
                    rearrange(x, "l h d -> h l d")
                    for x in (query[mine : mine + chunk], key[start : start + seen], value[start : start + seen])
                )
                mask = torch.ones(chunk, seen, dtype=torch.bool, device=q.device).tril(seen - chunk)
                attended = scaled_dot_product_attention(
                    q[None], k[None], v[None], attn_mask=mask, scale=self.softmax_scale, enable_gqa=True
                )
                outputs.append(rearrange(attended[0], "h l d -> l (h d)"))
                mine += chunk
            start += length
        return torch.cat(outputs)
