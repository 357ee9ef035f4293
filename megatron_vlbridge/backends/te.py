"""Transformer Engine's kernels; attention takes packs (THD) through `PackedSegments`."""

import importlib.util
import os
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.errors import VLBridgeError

# What the kernels take that attend over context-parallel ranks: flash-attention's and cuDNN's. The attention that
# serves fp32 is written in torch and has no context parallelism.
# Source: `get_attention_backend` (attention/dot_product_attention/utils.py) of Transformer Engine 2.20.
CP_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

# Environment variables of Transformer Engine 2.20 that choose kernels which no test runs.
_VARIABLES = {
    "NVTE_FUSED_ATTN_USE_FAv2_BWD": "the backward of flash-attention after cuDNN's forward",
    "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM": "the experts' weights as one grouped tensor",
    "NVTE_PLUGIN": "kernels of a plugin",
}


def spec_provider() -> BackendSpecProvider:
    """Megatron-Core's Transformer Engine provider.

    Raises:
        VLBridgeError: where Transformer Engine cannot be imported.
    """
    if not HAVE_TE:
        raise VLBridgeError(
            "the Transformer Engine backend needs the package transformer-engine, which cannot be imported here. "
            "Install the extra 'te' on a machine with a GPU, or call cpu_runtime.enable() first to use the CPU backend"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def check_context_parallel(config: TransformerConfig) -> None:
    """Refuse what attention over several context-parallel ranks has no kernel for.

    Raises:
        VLBridgeError: naming the setting, and what to use.
    """
    if config.params_dtype not in CP_DTYPES:
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


def faults(config: TransformerConfig) -> list[str]:
    """What Transformer Engine would run that no test runs, in words for a person."""
    found = [
        f"{what}: {name}={value} in the environment, proved: not set"
        for name, what in _VARIABLES.items()
        if (value := os.environ.get(name, "0")) not in ("", "0")
    ]
    if _prefers_flash_attention(config):
        found.append(
            "attention by flash-attention, which is installed and which Transformer Engine prefers before sm90: "
            f"attention_backend={config.attention_backend.name}, proved: fused (use --attention-backend fused)"
        )
    deterministic = {
        "deterministic_mode=True": config.deterministic_mode,
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0": os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0",
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if named := [name for name, value in deterministic.items() if value]:
        # Source: the filter for determinism in `get_attention_backend`.
        found.append(
            f"deterministic kernels ({', '.join(named)}): Transformer Engine then gives up cuDNN's attention of packs "
            "before sm90, and on sm90 where segments x heads x max_seqlen^2 reaches 2^30 (one segment of 8,192 tokens "
            "at 16 heads); what is left takes memory quadratic in the length and has no context parallelism. "
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
    """A model's sharded state dict whose modules keep their extra states to themselves.

    Only FP8, which is refused, would put something into them. Megatron's loader fails where a checkpoint lacks the
    empty ones, as one from the CPU backend does.

    Example:
        >>> entries = without_extra_states(model.decoder.sharded_state_dict())
    """
    return {
        name: LocalNonpersistentObject(entry.data)
        if isinstance(entry, ShardedObject) and entry.key.endswith("._extra_state")
        else entry
        for name, entry in entries.items()
    }
