"""The fields of Megatron's `TransformerConfig` that a checkpoint decides: Qwen3-VL and 3.5, dense or with experts."""

from functools import partial
from typing import Any

import torch

from megatron_vlbridge.config import Config, LinearAttentionConfig, MoeConfig, TextConfig

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
    """Those of the text part."""
    text = config.text
    fields = _COMMON | {
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
        "num_moe_experts": None,
        "moe_ffn_hidden_size": None,
    }
    if text.moe is not None:
        fields |= _expert_fields(text, text.moe)
    if text.linear_attention is not None:
        fields |= _linear_attention_fields(text, text.linear_attention)
    return fields


def _expert_fields(text: TextConfig, moe: MoeConfig) -> dict[str, Any]:
    """Router as in transformers: softmax in fp32 over all experts, the largest k, renormalised.

    Megatron takes the softmax of the k largest logits, which is the same.
    """
    layers, shared = [int(kind.experts) for kind in text.layer_kinds], moe.shared_expert_intermediate_size
    fields: dict[str, Any] = {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.num_experts_per_tok,
        "moe_ffn_hidden_size": moe.moe_intermediate_size,
        # Megatron names alike layers as one stack only where this is 1.
        "moe_layer_freq": 1 if len(set(layers)) == 1 else layers,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
    }
    if not text.intermediate_size:
        # No layer has a dense MLP, but a shared expert; Megatron asks for the size of dense ones all the same.
        fields["ffn_hidden_size"] = moe.moe_intermediate_size
        fields["moe_shared_expert_intermediate_size"] = shared or None
        fields["moe_shared_expert_gate"] = bool(shared)
    return fields


def _linear_attention_fields(text: TextConfig, linear: LinearAttentionConfig) -> dict[str, Any]:
    kinds = (*text.layer_kinds, *(text.mtp_layer_kind,) * text.num_mtp_layers)
    return {
        "layernorm_zero_centered_gamma": True,
        "attention_output_gate": text.attention_output_gate,
        "experimental_attention_variant": "gated_delta_net",
        # With a list Megatron stores the layers one by one; its count of operations expects the MTP layers in it.
        "linear_attention_freq": [int(kind.linear_attention) for kind in kinds],
        "linear_conv_kernel_dim": linear.conv_kernel_dim,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
    }


def vision_fields(config: Config) -> dict[str, Any]:
    """Those of the vision part."""
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
    }
