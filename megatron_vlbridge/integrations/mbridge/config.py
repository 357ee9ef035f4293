"""What mbridge's config of a model would be, for a model of this project."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.transformer_config import language_config


def transformer_config(
    checkpoint: Config, dtype: torch.dtype, sizes: Any, extra_args: Mapping[str, Any]
) -> TransformerConfig:
    """The language model's config as mbridge makes it from the parallel `sizes`, with `extra_args` over it.

    Source: `LLMBridge._build_base_config` of mbridge 0.15.1.
    """
    check_names("set_extra_args", extra_args, _names(TransformerConfig))
    fields = {
        "tensor_model_parallel_size": sizes.tp_size,
        "pipeline_model_parallel_size": sizes.pp_size,
        "virtual_pipeline_model_parallel_size": sizes.vpp_size,
        "context_parallel_size": sizes.cp_size,
        "expert_model_parallel_size": sizes.ep_size,
        "expert_tensor_parallel_size": sizes.etp_size,
        "sequence_parallel": sizes.tp_size > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "masked_softmax_fusion": True,
        "overlap_p2p_comm": sizes.vpp_size is not None and sizes.pp_size > 1,
        "batch_p2p_comm": False,
        # The caller averages the loss.
        "calculate_per_token_loss": False,
        **extra_args,
    }
    backend = fields.get("attention_backend")
    if isinstance(backend, str):
        check_names("attention_backend", [backend], AttnBackend.__members__)
        fields["attention_backend"] = AttnBackend[backend]
    return language_config(checkpoint, **fields)


def check_names(where: str, given: Collection[str], known: Collection[str]) -> None:
    """Reject names that are not known, which would be without effect."""
    if unknown := sorted(set(given) - set(known)):
        raise VLBridgeError(
            f"{where}: expected names that it has, found {', '.join(unknown)}. Correct them or leave them out."
        )


def _names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
