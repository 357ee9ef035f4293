"""Model FLOPs of a forward pass: the matrix products that a model needs for its tokens and patches.

A multiplication with its addition counts as two. Padding, recomputation, norms, activations, rotations and the
optimizer are not counted: the number depends on model and data alone, neither on layout nor on kernels.
"""

from dataclasses import dataclass

from megatron_vlbridge.config.schema import (
    Config,
    LayerKind,
    LinearAttentionConfig,
    MoeConfig,
    TextConfig,
    VisionConfig,
)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs for each token, each pair (query, key) of tokens in attention, each patch, and each pair of patches."""

    token: int
    token_pair: int
    patch: int
    patch_pair: int


def forward_flops(config: Config) -> ForwardFlops:
    """Those of the decoder, the MTP layers and the head, which runs for the decoder and each MTP layer; of the tower.

    Example: `forward_flops(read_config(folder)).token`.
    """
    text, vision = config.text, config.vision
    kinds = (*text.layer_kinds, *[text.mtp_layer_kind] * text.num_mtp_layers)
    layers = sum(_layer_macs(text, kind) for kind in kinds)
    joins = text.num_mtp_layers * 2 * text.hidden_size * text.hidden_size
    heads = (1 + text.num_mtp_layers) * text.hidden_size * text.vocab_size
    full = sum(not kind.linear_attention for kind in kinds)
    return ForwardFlops(
        token=2 * (layers + joins + heads),
        token_pair=full * 4 * text.num_attention_heads * text.head_dim,
        patch=2 * _patch_macs(vision),
        patch_pair=vision.depth * 4 * vision.hidden_size,
    )


def _patch_macs(vision: VisionConfig) -> int:
    """Multiplications for each patch: its embedding, the blocks without attention scores, and its share of mergers."""
    hidden = vision.hidden_size
    block = 4 * hidden**2 + 2 * hidden * vision.intermediate_size
    # A merger multiplies the joined patches, `merge_area * hidden` wide, twice.
    merger = hidden * (vision.merge_area * hidden + vision.out_hidden_size)
    mergers = 1 + len(vision.deepstack_visual_indexes)
    return vision.patch_dim * hidden + vision.depth * block + mergers * merger


def _layer_macs(text: TextConfig, kind: LayerKind) -> int:
    """Multiplications of a decoder layer for each token, without those of attention scores."""
    linear = text.linear_attention if kind.linear_attention else None
    mixer = _attention_macs(text) if linear is None else linear_attention_macs(text.hidden_size, linear)
    moe = text.moe if kind.experts else None
    mlp = 3 * text.hidden_size * text.intermediate_size if moe is None else _experts_macs(text.hidden_size, moe)
    return mixer + mlp


def _attention_macs(text: TextConfig) -> int:
    query = text.num_attention_heads * text.head_dim
    key_value = 2 * text.num_key_value_heads * text.head_dim
    return text.hidden_size * ((2 + text.attention_output_gate) * query + key_value)


def linear_attention_macs(hidden_size: int, linear: LinearAttentionConfig) -> int:
    """Multiplications of a linear attention layer for each token.

    The delta rule reads its state `[key dim, value dim]` of each value head with the key, updates it, and reads it
    with the query. (Gated DeltaNet, arXiv 2412.06464, equation 10; kernels that work in chunks do more.)
    """
    keys, values = linear.num_key_heads * linear.key_head_dim, linear.num_value_heads * linear.value_head_dim
    projections = hidden_size * (2 * keys + 3 * values + 2 * linear.num_value_heads)
    convolution = linear.conv_kernel_dim * (2 * keys + values)
    return projections + convolution + 3 * values * linear.key_head_dim


def _experts_macs(hidden_size: int, moe: MoeConfig) -> int:
    """The router, the experts that a token is sent to, and the shared expert with its gate."""
    shared = moe.shared_expert_intermediate_size
    active = 3 * (moe.num_experts_per_tok * moe.moe_intermediate_size + shared)
    return hidden_size * (moe.num_experts + active + bool(shared))
