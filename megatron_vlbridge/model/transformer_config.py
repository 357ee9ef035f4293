"""`Config` -> Megatron `TransformerConfig`, for the language model and for the vision tower."""

import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError

gelu_tanh = partial(torch.nn.functional.gelu, approximate="tanh")

# What both parts fix, whatever Megatron's defaults are.
_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "layernorm_zero_centered_gamma": False,
    "bias_activation_fusion": False,
    "window_size": None,
    "rotary_interleaved": False,
    "apply_rope_fusion": False,
}


def language_fields(config: Config) -> dict[str, Any]:
    """The `TransformerConfig` fields that a checkpoint's text part decides."""
    text = config.text
    return (
        _COMMON
        | _expert_fields(config)
        | {
            "num_layers": text.num_layers,
            "hidden_size": text.hidden_size,
            "ffn_hidden_size": text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads,
            "kv_channels": text.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": text.rms_norm_eps,
            "qk_layernorm": True,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "init_method_std": text.initializer_range,
            "mtp_num_layers": text.num_mtp_layers or None,
        }
    )


def _expert_fields(config: Config) -> dict[str, Any]:
    """Router as in transformers: softmax in fp32 over all experts, the largest k, renormalised.

    Megatron takes the softmax of the k largest logits, which is the same.
    """
    moe = config.text.moe
    if moe is None:
        return {"num_moe_experts": None}
    layers = [int(moe.is_moe_layer(number)) for number in range(config.text.num_layers)]
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.num_experts_per_tok,
        "moe_ffn_hidden_size": moe.moe_intermediate_size,
        # Megatron names alike layers as one stack only where this is 1.
        "moe_layer_freq": 1 if len(set(layers)) == 1 else layers,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
    }


def vision_fields(config: Config) -> dict[str, Any]:
    """The `TransformerConfig` fields that a checkpoint's vision part decides.

    The tower lives whole on the first pipeline stage and is not cut by context parallelism.
    """
    vision = config.vision
    return _COMMON | {
        "num_layers": vision.depth,
        "hidden_size": vision.hidden_size,
        "ffn_hidden_size": vision.intermediate_size,
        "num_attention_heads": vision.num_heads,
        "num_query_groups": vision.num_heads,
        "kv_channels": vision.hidden_size // vision.num_heads,
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": False,
        "gated_linear_unit": False,
        "activation_func": gelu_tanh,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "init_method_std": vision.initializer_range,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "pipeline_model_parallel_layout": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "variable_seq_lengths": False,
        "context_parallel_size": 1,
        "mtp_num_layers": None,
        "num_moe_experts": None,
        "moe_ffn_hidden_size": None,
        "moe_layer_freq": 1,
        "expert_model_parallel_size": 1,
        "moe_grouped_gemm": False,
    }


def language_config(config: Config, base: TransformerConfig | None = None, **overrides: Any) -> TransformerConfig:
    """The language model's `TransformerConfig`: the checkpoint's fields over `base` (parallel sizes, precision, ...).

    Without `base` the loss is averaged over tokens (`calculate_per_token_loss`), the only average that is supported.

    Example:
        >>> language_config(read_config("Qwen3-VL-2B-Instruct"), tensor_model_parallel_size=2)
    """
    asked = 0 if base is None else base.mtp_num_layers or 0
    if asked not in (0, config.text.num_mtp_layers):
        raise VLBridgeError(
            f"mtp_num_layers: expected {config.text.num_mtp_layers}, as the checkpoint's config says, found {asked}. "
            "Leave it out: it is read from the checkpoint"
        )
    loss = {"calculate_per_token_loss": True} if base is None else {}
    built = _over(base, loss | language_fields(config) | overrides)
    if deepstack_travels(built, config):
        if config.text.moe is not None and built.moe_token_dispatcher_type == "allgather":
            raise VLBridgeError(
                "the layers that take deepstack features lie on several pipeline stages, which needs hidden states of "
                "changing length, and Megatron's all-gather dispatcher of tokens to experts takes none. "
                "Use --moe-token-dispatcher-type alltoall, or give the first stage "
                f"{len(config.vision.deepstack_visual_indexes)} layers"
            )
        built.variable_seq_lengths = True
        if config.text.moe is None:
            # Megatron asks for it all the same.
            built.moe_token_dispatcher_type = "alltoall"
    return built


def deepstack_travels(language: TransformerConfig, config: Config) -> bool:
    """Whether layers that take deepstack features lie behind the first (virtual) pipeline stage."""
    if language.pipeline_model_parallel_size == 1:
        return False
    if language.pipeline_model_parallel_layout is not None:
        first = language.pipeline_model_parallel_layout.layout[0][0].count(LayerType.decoder)
    else:
        first = get_num_layers_to_build(language, vp_stage=0, pp_rank=0)
    return bool(first < len(config.vision.deepstack_visual_indexes))


def vision_config(config: Config, language: TransformerConfig) -> TransformerConfig:
    """The vision tower's `TransformerConfig`: the checkpoint's fields over the language model's."""
    fields = vision_fields(config)
    if language.recompute_method == "uniform":
        # Deepstack features are taken between layers, which recomputed groups of several layers do not give.
        fields["recompute_num_layers"] = 1
    return _over(language, fields)


def _over(base: TransformerConfig | None, fields: dict[str, Any]) -> TransformerConfig:
    if base is None:
        return TransformerConfig(**fields)
    # Made again for this part's own standard deviation and depth.
    initializers = {"init_method": None, "output_layer_init_method": None, "embedding_init_method": None}
    return dataclasses.replace(base, **{**initializers, **fields})
