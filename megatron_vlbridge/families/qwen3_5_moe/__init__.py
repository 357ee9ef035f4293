"""Qwen3.5 with experts and a shared expert (35B-A3B, 122B-A10B, 397B-A17B).

Defaults are those of transformers 5.23 (`configuration_qwen3_5_moe.py`).
"""

from dataclasses import replace

from megatron_vlbridge.config import ConfigFormat
from megatron_vlbridge.families import qwen3_vl_moe
from megatron_vlbridge.families.experts import ExpertForm
from megatron_vlbridge.families.qwen3_5 import TEXT, TOKENS, VISION

CONFIG = ConfigFormat(
    model_type="qwen3_5_moe",
    architecture="Qwen3_5MoeForConditionalGeneration",
    text=TEXT
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "router_aux_loss_coef": 0.001,
    },
    vision=VISION,
    tokens=TOKENS,
)

FAMILY = replace(qwen3_vl_moe.FAMILY, config=CONFIG, expert_form=ExpertForm.FUSED_OUT_IN)
