"""What is special to Transformer Engine: settings its kernels do not support, and checkpoint entries of its modules."""

import importlib.util
import os
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.ssm import gated_delta_net
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.errors import VLBridgeError

# The dtypes of kernels that are verified: of attention over context-parallel ranks (flash-attention's and cuDNN's; fp32
# attention is written in torch and has none), and of linear attention.
# Source: `get_attention_backend` (attention/dot_product_attention/utils.py) of Transformer Engine 2.20.
KERNEL_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

# Environment variables of Transformer Engine 2.20 that choose kernels which no test runs.
_VARIABLES = {
    "NVTE_FUSED_ATTN_USE_FAv2_BWD": "the backward of flash-attention after cuDNN's forward",
    "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM": "the experts' weights as one grouped tensor",
    "NVTE_PLUGIN": "kernels of a plugin",
}


def check_context_parallel(config: TransformerConfig) -> None:
    """Reject what attention over several context-parallel ranks has no kernel for.

    Raises:
        VLBridgeError: naming the setting, and what to use.
    """
    if config.params_dtype not in KERNEL_DTYPES:
        raise VLBridgeError(
            f"context parallelism (context_parallel_size={config.context_parallel_size}) in "
            f"{str(config.params_dtype).removeprefix('torch.')}: Transformer Engine has no attention for it. "
            "Use --bf16, or --context-parallel-size 1"
        )
    if config.attention_backend == AttnBackend.unfused:
        raise VLBridgeError(
            f"context parallelism (context_parallel_size={config.context_parallel_size}) with attention_backend "
            "unfused: Transformer Engine's unfused attention has none. Use --attention-backend auto or fused"
        )


def faults(config: TransformerConfig, linear_attention: bool) -> list[str]:
    """What Transformer Engine would run with kernels that no test runs, and kernels that are not there: a line each."""
    found = [
        f"{what}: {name}={value} in the environment, verified: not set"
        for name, what in _VARIABLES.items()
        if (value := os.environ.get(name, "0")) not in ("", "0")
    ]
    if linear_attention and not gated_delta_net.HAVE_FLA:
        found.append(
            "linear attention without flash-linear-attention, whose kernels it needs on a GPU: pip install "
            '"megatron-vlbridge[fla]"'
        )
    if linear_attention and config.params_dtype not in KERNEL_DTYPES:
        found.append(
            "linear attention in float32: flash-linear-attention's matrix products are in TF32 then, verified: "
            "bfloat16 (use --bf16)"
        )
    if _prefers_flash_attention(config):
        found.append(
            "attention by flash-attention, which is installed and which Transformer Engine prefers before sm90: "
            f"attention_backend={config.attention_backend.name}, verified: fused (use --attention-backend fused)"
        )
    deterministic = {
        "deterministic_mode=True": config.deterministic_mode,
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0": os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0",
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if named := [name for name, value in deterministic.items() if value]:
        # Source: the filter for determinism in `get_attention_backend`.
        found.append(
            f"deterministic kernels ({', '.join(named)}): Transformer Engine then does not use cuDNN's attention of "
            "packs before sm90, and on sm90 where segments x heads x max_seqlen^2 reaches 2^30 (one segment of 8,192 "
            "tokens at 16 heads); what is left takes memory quadratic in the length and has no context parallelism. "
            "Leave --deterministic-mode out"
        )
    return found


def _prefers_flash_attention(config: TransformerConfig) -> bool:
    """Source: the end of `get_attention_backend`; versions 3 and 4 of flash-attention need sm90."""
    return (
        config.attention_backend == AttnBackend.auto
        and config.params_dtype in (torch.bfloat16, torch.float16)
        and importlib.util.find_spec("flash_attn") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() < (9, 0)
    )


def without_extra_states(entries: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state dict whose modules' extra states are neither stored nor loaded.

    Only FP8, which is rejected, would use them. Megatron's loader fails where a checkpoint has no such entries, as
    one from the CPU backend.

    Example:
        >>> entries = without_extra_states(model.decoder.sharded_state_dict())
    """
    return {
        name: LocalNonpersistentObject(entry.data)
        if isinstance(entry, ShardedObject) and entry.key.endswith("._extra_state")
        else entry
        for name, entry in entries.items()
    }
