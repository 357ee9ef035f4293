"""Qwen3-VL with experts: the vision tower and the attention of the dense family, a router and experts in its layers.

The norm before the experts stays a tensor of its own, `pre_mlp_layernorm`, as no linear follows it directly.
"""

from megatron_vlbridge.config import Config
from megatron_vlbridge.families.experts import ExpertLayout, expert_rules, moe_layers
from megatron_vlbridge.families.mtp import mtp_rules
from megatron_vlbridge.families.qwen3_vl.rules import (
    HF_LAYERS,
    LAYERS,
    attention_rules,
    embedding_rules,
    mlp_rules,
    vision_rules,
)
from megatron_vlbridge.weights import Copy, Rule


def rules(config: Config, experts: ExpertLayout, mtp_experts: ExpertLayout) -> list[Rule]:
    """All rules of a Qwen3-VL-MoE checkpoint, whose experts HF holds in the layout `experts`.

    Those of the MTP layer, which always has experts, have a layout of their own, `mtp_experts`. Where
    some layers have experts and others a dense MLP, Megatron's names of the layers are `layers.0`, `layers.1` and so
    on, otherwise the layers are stacked.
    """
    text, with_experts = config.text, moe_layers(config)
    stacked = len(with_experts) in (0, text.num_layers)
    result = embedding_rules(config)
    for layer in range(text.num_layers):
        hf = f"{HF_LAYERS}.{layer}"
        to = LAYERS if stacked else f"{LAYERS}.{layer}"
        index = layer if stacked else None
        result += attention_rules(text, hf, to, index)
        if layer in with_experts:
            result += sparse_rules(config, experts, hf, to, index)
        else:
            result += mlp_rules(text, hf, to, index)

    def mtp_layer(hf: str, to: str) -> list[Rule]:
        return attention_rules(text, hf, to, None) + sparse_rules(config, mtp_experts, hf, to, None)

    return result + mtp_rules(config, mtp_layer) + vision_rules(config.vision)


def sparse_rules(config: Config, experts: ExpertLayout, hf: str, to: str, layer: int | None) -> list[Rule]:
    """The router and the experts of a decoder layer and the norm before them; names and `layer` as elsewhere."""
    norm = f"{hf}.post_attention_layernorm.weight", f"{to}.pre_mlp_layernorm.weight"
    return [
        Copy(*norm, (config.text.hidden_size,), layer),
        *expert_rules(config, experts, f"{hf}.mlp", f"{to}.mlp", layer),
    ]
