"""Qwen3.5-MoE: its `config.json` can be read, its weights are not supported.

Defaults of transformers 5.23 (`configuration_qwen3_5_moe.py`).
"""

from megatron_vlbridge.config import ConfigFormat
from megatron_vlbridge.families.qwen3_5 import TEXT, TOKENS, VISION
from megatron_vlbridge.families.qwen3_vl_moe.config import EXPERT_LAYERS

CONFIG = ConfigFormat(
    model_type="qwen3_5_moe",
    architecture="Qwen3_5MoeForConditionalGeneration",
    text=TEXT
    | EXPERT_LAYERS
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    vision=VISION,
    tokens=TOKENS,
)
