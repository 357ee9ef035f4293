"""What Qwen3-VL's `config.json` holds and decides; defaults of transformers 5.23 (`configuration_qwen3_vl.py`)."""

from functools import partial
from typing import Any

import torch

from megatron_vlbridge.config import Config, ConfigFormat

# What Qwen3-VL-MoE has in common.
TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
    "mrope_section": [24, 20, 20],
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "mtp_num_hidden_layers": 0,
}
VISION: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "initializer_range": 0.02,
    "deepstack_visual_indexes": [8, 16, 24],
}
TOKENS = (151655, 151656, 151652, 151653)

CONFIG = ConfigFormat(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    text=TEXT
    | {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    vision=VISION,
    tokens=TOKENS,
)


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
    """The fields of Megatron's `TransformerConfig` that the text part decides."""
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
    """The fields that the vision part decides."""
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
