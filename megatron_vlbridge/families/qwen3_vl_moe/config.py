"""The `config.json` of Qwen3-VL-MoE; defaults of transformers 5.23 (`configuration_qwen3_vl_moe.py`)."""

from typing import Any

from megatron_vlbridge.config import ConfigFormat
from megatron_vlbridge.families.qwen3_vl.config import TEXT, TOKENS, VISION

# Which layers have experts.
EXPERT_LAYERS: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}

CONFIG = ConfigFormat(
    model_type="qwen3_vl_moe",
    architecture="Qwen3VLMoeForConditionalGeneration",
    text=TEXT
    | EXPERT_LAYERS
    | {
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
)
