"""Layers of linear attention, as Qwen3.5 names them. Megatron stores their projection and convolution part by part."""

from megatron_vlbridge.config import TextConfig
from megatron_vlbridge.weights import Copy, Rule, SplitRows


def linear_attention_rules(text: TextConfig, hf: str, to: str) -> list[Rule]:
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
