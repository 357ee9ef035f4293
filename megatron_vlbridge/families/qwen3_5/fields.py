"""The fields of Megatron's `TransformerConfig` that a Qwen3.5 checkpoint decides."""

from typing import Any

from megatron_vlbridge.config import Config
from megatron_vlbridge.families.qwen3_vl.fields import language_fields as full_attention_fields


def language_fields(config: Config) -> dict[str, Any]:
    """Those of the text part."""
    text, linear = config.text, config.text.linear_attention
    assert linear is not None
    kinds = (*text.layer_kinds, *(text.mtp_layer_kind,) * text.num_mtp_layers)
    return full_attention_fields(config) | {
        "layernorm_zero_centered_gamma": True,
        "attention_output_gate": text.attention_output_gate,
        "experimental_attention_variant": "gated_delta_net",
        # With a list Megatron stores the layers one by one; its count of operations expects the MTP layers in it.
        "linear_attention_freq": [int(kind.linear_attention) for kind in kinds],
        "linear_conv_kernel_dim": linear.conv_kernel_dim,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
    }
