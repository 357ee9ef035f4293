"""What the `config.json` of Qwen3-VL-MoE holds and decides; defaults of transformers 5.23 (`Qwen3VLMoeConfig`)."""

from typing import Any

from megatron_vlbridge.config import Config, ConfigFormat, MoeConfig
from megatron_vlbridge.families.qwen3_vl.config import TEXT, TOKENS, VISION
from megatron_vlbridge.families.qwen3_vl.config import language_fields as dense_fields

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


def language_fields(config: Config) -> dict[str, Any]:
    """The fields of Megatron's `TransformerConfig` that the text part decides."""
    assert config.text.moe is not None
    layers = [int(kind.experts) for kind in config.text.layer_kinds]
    return dense_fields(config) | expert_fields(config.text.moe, layers)


def expert_fields(moe: MoeConfig, layers: list[int]) -> dict[str, Any]:
    """Router as in transformers: softmax in fp32 over all experts, the largest k, renormalised.

    Megatron takes the softmax of the k largest logits, which is the same. `layers` has 1 for each layer with experts.
    """
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
