"""The fields of Megatron's `TransformerConfig` that a Qwen3-VL checkpoint decides."""

from functools import partial
from typing import Any

import torch

from megatron_vlbridge.config import Config

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
    return _COMMON | {
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
