"""The fields of Megatron's `TransformerConfig` that a Qwen3.5-MoE checkpoint decides."""

from typing import Any

from megatron_vlbridge.config import Config
from megatron_vlbridge.families.qwen3_5.fields import language_fields as dense_fields
from megatron_vlbridge.families.qwen3_vl_moe.fields import expert_fields


def language_fields(config: Config) -> dict[str, Any]:
    """Those of the text part."""
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
