"""The fields of Megatron's `TransformerConfig` that a Qwen3-VL-MoE checkpoint decides."""

from typing import Any

from megatron_vlbridge.config import Config, MoeConfig
from megatron_vlbridge.families.qwen3_vl.fields import language_fields as dense_fields


def language_fields(config: Config) -> dict[str, Any]:
    """Those of the text part."""
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
