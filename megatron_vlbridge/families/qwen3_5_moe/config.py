"""What Qwen3.5-MoE's `config.json` holds and decides; defaults: transformers 5.23 (`configuration_qwen3_5_moe.py`)."""

from typing import Any

from megatron_vlbridge.config import Config, ConfigFormat
from megatron_vlbridge.families.qwen3_5.config import TEXT, TOKENS, VISION
from megatron_vlbridge.families.qwen3_5.config import language_fields as dense_fields
from megatron_vlbridge.families.qwen3_vl_moe.config import expert_fields

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


def language_fields(config: Config) -> dict[str, Any]:
    """The fields of Megatron's `TransformerConfig` that the text part decides."""
    moe = config.text.moe
    assert moe is not None
    layers = [int(kind.experts) for kind in config.text.layer_kinds]
    shared = moe.shared_expert_intermediate_size
    return (
        dense_fields(config)
        | expert_fields(moe, layers)
        | {
            # No layer has a dense MLP; Megatron asks for its size all the same.
            "ffn_hidden_size": moe.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": shared or None,
            "moe_shared_expert_gate": bool(shared),
        }
    )
