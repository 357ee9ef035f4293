"""Linear attention by the gated delta rule: Megatron's `GatedDeltaNet`, over packs and with its decay in fp32."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


class OutputNorm(torch.nn.Module):
    """RMSNorm over the dims of a value head, in fp32 and with weights that stay in fp32.

    Unlike the model's other norms it is not zero-centered. Each tensor-parallel rank norms its own heads, so the
    gradient of the weight is summed over the ranks here; Megatron-Core sums that of marked parameters only, and only
    under sequence parallelism.
    """

    tp_group: torch.distributed.ProcessGroup | None = None

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=torch.cuda.current_device()))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` in any dtype -> the same in fp32."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
        return torch.nn.functional.rms_norm(heads.float(), weight.shape, weight, self.eps)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "OutputNorm":
        return _apply_without_cast(super()._apply, fn, self.weight)


class LinearAttention(GatedDeltaNet):
    """Megatron's gated delta net; `packed_seq_params` is a `PackedSegments`.

    `A_log`, whose exponential is the decay per token, stays in fp32 when the model is cast.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.A_log.data = self.A_log.data.float()
        self.out_norm.tp_group = self.pg_collection.tp

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LinearAttention":
        return _apply_without_cast(super()._apply, fn, self.A_log)

    def _resolve_cu_seqlens(
        self,
        cu_seqlens_padded: torch.Tensor,
        cu_seqlens_actual: torch.Tensor,
        total_seq_len: int,
        name: str,
        cp_size: int = 1,
    ) -> torch.Tensor:
        """Those of the whole pack. Megatron-Core checks them with several host syncs in each layer."""
        return cu_seqlens_padded


def _apply_without_cast(apply: Callable[..., Any], fn: Callable[..., Any], parameter: torch.nn.Parameter) -> Any:
    """`apply(fn)`, the implementation of `Module.to`, that moves `parameter` but leaves its values in fp32."""
    values = parameter.data
    module = apply(fn)
    parameter.data = values.to(parameter.device)
    return module
