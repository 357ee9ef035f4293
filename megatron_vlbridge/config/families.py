"""The model types whose `config.json` can be read, with what transformers 5.23 takes for each absent key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one model type differs in keys and in transformers' defaults.

    `supported`: whether its weights can be converted and trained; else only its config.json can be read.
    """

    architecture: str
    has_moe: bool
    has_linear_attention: bool
    text_defaults: Mapping[str, Any]
    token_defaults: tuple[int, int, int, int]  # image, video, vision start, vision end
    supported: bool = True


_VL_TEXT = {
    "vocab_size": 151936,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
    "mrope_section": [24, 20, 20],
    "partial_rotary_factor": 1.0,
}
_VL_TOKENS = (151655, 151656, 151652, 151653)
_35_TEXT = {
    "vocab_size": 248320,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "mrope_section": [11, 11, 10],
    "partial_rotary_factor": 0.25,
    "head_dim": 256,
    "num_attention_heads": 16,
}
_35_TOKENS = (248056, 248057, 248053, 248054)

FAMILIES: dict[str, Family] = {
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        False,
        False,
        _VL_TEXT
        | {
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        _VL_TOKENS,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        True,
        False,
        _VL_TEXT
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": None,  # hidden_size // num_attention_heads
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 0,
        },
        _VL_TOKENS,
    ),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration",
        False,
        True,
        _35_TEXT | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_key_value_heads": 4},
        _35_TOKENS,
        supported=False,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForConditionalGeneration",
        True,
        True,
        _35_TEXT
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        _35_TOKENS,
        supported=False,
    ),
}
