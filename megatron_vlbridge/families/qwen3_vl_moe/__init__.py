"""Qwen3-VL with experts (30B-A3B, 235B-A22B); defaults of transformers 5.23 (`configuration_qwen3_vl_moe.py`)."""

from dataclasses import replace

from megatron_vlbridge.config import ConfigFormat
from megatron_vlbridge.families import qwen3_vl
from megatron_vlbridge.families.family import combinations
from megatron_vlbridge.families.qwen3_vl.config import TEXT, TOKENS, VISION

CONFIG = ConfigFormat(
    model_type="qwen3_vl_moe",
    architecture="Qwen3VLMoeForConditionalGeneration",
    text=TEXT
    | {
        # Which layers have experts.
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
    },
    vision=VISION,
    tokens=TOKENS,
    in_transformers_4=True,
)

FAMILY = replace(
    qwen3_vl.FAMILY,
    config=CONFIG,
    combinations=combinations(
        ("", "ep", "tp sp", "tp sp etp", "tp sp ep", "tp sp ep etp"), qwen3_vl.PIPELINES, qwen3_vl.CONTEXTS
    ),
    mtp_settings={"moe_aux_loss_coeff": (0, None), "moe_z_loss_coeff": (0, None)},
)
