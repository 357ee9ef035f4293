"""Qwen3.5, dense or with experts: layers of linear and of gated full attention, the vision tower of Qwen3-VL.

Megatron stores the layers one by one, and of a linear attention each part of its projection and its convolution.
"""

from megatron_vlbridge.config import Config, LayerKind, TextConfig
from megatron_vlbridge.families.experts import ExpertLayout
from megatron_vlbridge.families.mtp import mtp_rules
from megatron_vlbridge.families.qwen3_vl.rules import (
    HF_LAYERS,
    LAYERS,
    attention_rules,
    embedding_rules,
    mlp_rules,
    vision_rules,
)
from megatron_vlbridge.families.qwen3_vl_moe.rules import sparse_rules
from megatron_vlbridge.weights import Copy, Rule, SplitRows


def rules(config: Config, experts: ExpertLayout, mtp_experts: ExpertLayout) -> list[Rule]:
    """All rules of a Qwen3.5 checkpoint, whose experts HF holds in these layouts."""

    def mtp_layer(hf: str, to: str) -> list[Rule]:
        return _layer_rules(config, config.text.mtp_layer_kind, mtp_experts, hf, to)

    result = embedding_rules(config)
    for layer, kind in enumerate(config.text.layer_kinds):
        result += _layer_rules(config, kind, experts, f"{HF_LAYERS}.{layer}", f"{LAYERS}.{layer}")
    return result + mtp_rules(config, mtp_layer) + vision_rules(config.vision)


def _layer_rules(config: Config, kind: LayerKind, experts: ExpertLayout, hf: str, to: str) -> list[Rule]:
    linear = kind.linear_attention
    attention = _linear_attention_rules(config.text, hf, to) if linear else attention_rules(config.text, hf, to, None)
    mlp = sparse_rules(config, experts, hf, to, None) if kind.experts else mlp_rules(config.text, hf, to, None)
    return attention + mlp


def _linear_attention_rules(text: TextConfig, hf: str, to: str) -> list[Rule]:
    """A gated delta net and the norm before it, in the names of both sides' components.

    Its projections `b` and `a` are Megatron's `beta` and `alpha`. `A_log`, `dt_bias` and the norm of its output are one
    value for each value head or each of its dims.
    """
    linear, hidden = text.linear_attention, text.hidden_size
    assert linear is not None
    heads, keys = linear.num_value_heads, linear.num_key_heads * linear.key_head_dim
    values, source, target = heads * linear.value_head_dim, f"{hf}.linear_attn", f"{to}.self_attention"
    qkv = ("query", keys), ("key", keys), ("value", values)
    weight, conv = f"{target}.in_proj.weight", f"{target}.conv1d.weight"
    return [
        Copy(f"{hf}.input_layernorm.weight", f"{target}.in_proj.layer_norm_weight", (hidden,)),
        SplitRows(f"{source}.in_proj_qkv.weight", tuple((f"{weight}.{part}", rows) for part, rows in qkv), (hidden,)),
        Copy(f"{source}.in_proj_z.weight", f"{weight}.z", (values, hidden)),
        Copy(f"{source}.in_proj_b.weight", f"{weight}.beta", (heads, hidden)),
        Copy(f"{source}.in_proj_a.weight", f"{weight}.alpha", (heads, hidden)),
        SplitRows(
            f"{source}.conv1d.weight",
            tuple((f"{conv}.{part}", rows) for part, rows in qkv),
            (1, linear.conv_kernel_dim),
        ),
        Copy(f"{source}.A_log", f"{target}.A_log", (heads,)),
        Copy(f"{source}.dt_bias", f"{target}.dt_bias", (heads,)),
        Copy(f"{source}.norm.weight", f"{target}.out_norm.weight", (linear.value_head_dim,)),
        Copy(f"{source}.out_proj.weight", f"{target}.out_proj.weight", (hidden, values)),
    ]
