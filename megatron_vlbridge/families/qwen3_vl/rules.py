"""The HF <-> Megatron weight mapping of every family: Qwen3-VL, Qwen3.5 and Cosmos3, dense or with experts."""

from megatron_vlbridge.config import Config, LayerKind, TextConfig, VisionConfig
from megatron_vlbridge.families.experts import ExpertForm, expert_rules
from megatron_vlbridge.families.linear_attention import linear_attention_rules
from megatron_vlbridge.families.mtp import mtp_rules
from megatron_vlbridge.weights import Copy, Rule, gate_up, grouped_qkv, vision_qkv

_HF_TEXT, _TEXT = "model.language_model", "language_model"
_HF_VISION, _VISION = "model.visual", "vision_model"
HF_LAYERS, LAYERS = f"{_HF_TEXT}.layers", f"{_TEXT}.decoder.layers"
EMBEDDING = f"{_HF_TEXT}.embed_tokens.weight"


def rules(config: Config, experts: ExpertForm, mtp_experts: ExpertForm) -> list[Rule]:
    """All rules of a checkpoint; `experts` and `mtp_experts` say how HF stores the experts of decoder and MTP layer.

    In torch_dist checkpoints Megatron stores layers that are all alike as one tensor with a leading layer axis, others
    as `layers.0.*`, `layers.1.*` and so on.
    """

    def mtp_layer(hf: str, to: str) -> list[Rule]:
        return _layer_rules(config, config.text.mtp_layer_kind, mtp_experts, hf, to, None)

    kinds = config.text.layer_kinds
    stacked = len(set(kinds)) == 1
    assert not (stacked and kinds[0].linear_attention), "linear attention has no rules for stacked layers"
    result = _embedding_rules(config)
    for layer, kind in enumerate(kinds):
        to, index = (LAYERS, layer) if stacked else (f"{LAYERS}.{layer}", None)
        result += _layer_rules(config, kind, experts, f"{HF_LAYERS}.{layer}", to, index)
    return result + mtp_rules(config, mtp_layer) + _vision_rules(config.vision)


def _layer_rules(
    config: Config, kind: LayerKind, experts: ExpertForm, hf: str, to: str, layer: int | None
) -> list[Rule]:
    """One decoder layer: prefixes of its names on both sides, and its index in tensors that stack the layers, or None.

    Linear attention stands beside full attention, so its layers are never stacked.
    """
    text = config.text
    linear = kind.linear_attention
    attention = linear_attention_rules(text, hf, to) if linear else _attention_rules(text, hf, to, layer)
    if not kind.experts:
        return attention + _mlp_rules(text, hf, to, layer)
    # No linear follows the norm before the experts directly, so it stays a tensor of its own.
    norm = f"{hf}.post_attention_layernorm.weight", f"{to}.pre_mlp_layernorm.weight"
    sparse = expert_rules(config, experts, f"{hf}.mlp", f"{to}.mlp", layer)
    return [*attention, Copy(*norm, (text.hidden_size,), layer), *sparse]


def _embedding_rules(config: Config) -> list[Rule]:
    """Both ends of the language model. Where the embeddings are tied, neither side has an output head."""
    hidden, vocabulary = config.text.hidden_size, (config.text.vocab_size, config.text.hidden_size)
    embedding = EMBEDDING, f"{_TEXT}.embedding.word_embeddings.weight"
    result: list[Rule] = [
        Copy(*embedding, vocabulary, padded_rows=True),
        Copy(f"{_HF_TEXT}.norm.weight", f"{_TEXT}.decoder.final_layernorm.weight", (hidden,)),
    ]
    if not config.tie_word_embeddings:
        result.append(Copy("lm_head.weight", f"{_TEXT}.output_layer.weight", vocabulary, padded_rows=True))
    return result


def _attention_rules(text: TextConfig, hf: str, to: str, layer: int | None) -> list[Rule]:
    hidden, head_dim = text.hidden_size, text.head_dim
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    q, k, v = (f"{hf}.self_attn.{part}_proj.weight" for part in "qkv")
    attention = f"{to}.self_attention"
    return [
        Copy(f"{hf}.input_layernorm.weight", f"{attention}.linear_qkv.layer_norm_weight", (hidden,), layer),
        grouped_qkv(
            q,
            k,
            v,
            f"{attention}.linear_qkv.weight",
            heads,
            groups,
            head_dim,
            (hidden,),
            layer,
            gated=text.attention_output_gate,
        ),
        Copy(f"{hf}.self_attn.q_norm.weight", f"{attention}.q_layernorm.weight", (head_dim,), layer),
        Copy(f"{hf}.self_attn.k_norm.weight", f"{attention}.k_layernorm.weight", (head_dim,), layer),
        Copy(f"{hf}.self_attn.o_proj.weight", f"{attention}.linear_proj.weight", (hidden, heads * head_dim), layer),
    ]


def _mlp_rules(text: TextConfig, hf: str, to: str, layer: int | None) -> list[Rule]:
    """The dense MLP of a decoder layer and the norm before it."""
    hidden, inner, mlp = text.hidden_size, text.intermediate_size, f"{to}.mlp"
    gate, up = (f"{hf}.mlp.{part}_proj.weight" for part in ("gate", "up"))
    return [
        Copy(f"{hf}.post_attention_layernorm.weight", f"{mlp}.linear_fc1.layer_norm_weight", (hidden,), layer),
        gate_up(gate, up, f"{mlp}.linear_fc1.weight", inner, (hidden,), layer),
        Copy(f"{hf}.mlp.down_proj.weight", f"{mlp}.linear_fc2.weight", (hidden, inner), layer),
    ]


def _vision_rules(vision: VisionConfig) -> list[Rule]:
    result = _vision_ends(vision)
    for layer in range(vision.depth):
        result += _vision_block(vision, layer)
    return result


def _vision_block(vision: VisionConfig, layer: int) -> list[Rule]:
    hf, to = f"{_HF_VISION}.blocks.{layer}", f"{_VISION}.decoder.layers"
    hidden, inner, heads = vision.hidden_size, vision.intermediate_size, vision.num_heads
    head_dim = hidden // heads
    qkv, mlp = f"{to}.self_attention.linear_qkv", f"{to}.mlp"
    return [
        Copy(f"{hf}.norm1.weight", f"{qkv}.layer_norm_weight", (hidden,), layer),
        Copy(f"{hf}.norm1.bias", f"{qkv}.layer_norm_bias", (hidden,), layer),
        vision_qkv(f"{hf}.attn.qkv.weight", f"{qkv}.weight", heads, head_dim, (hidden,), layer),
        vision_qkv(f"{hf}.attn.qkv.bias", f"{qkv}.bias", heads, head_dim, (), layer),
        *_linear(f"{hf}.attn.proj", f"{to}.self_attention.linear_proj", hidden, hidden, layer),
        Copy(f"{hf}.norm2.weight", f"{mlp}.linear_fc1.layer_norm_weight", (hidden,), layer),
        Copy(f"{hf}.norm2.bias", f"{mlp}.linear_fc1.layer_norm_bias", (hidden,), layer),
        *_linear(f"{hf}.mlp.linear_fc1", f"{mlp}.linear_fc1", inner, hidden, layer),
        *_linear(f"{hf}.mlp.linear_fc2", f"{mlp}.linear_fc2", hidden, inner, layer),
    ]


def _vision_ends(vision: VisionConfig) -> list[Rule]:
    """Patch embedding, positions, mergers. Deepstack mergers normalise joined patches, the last merger single ones."""
    patch = (vision.hidden_size, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    embed, positions = "patch_embed.proj", "pos_embed.weight"
    result: list[Rule] = [
        Copy(f"{_HF_VISION}.{embed}.weight", f"{_VISION}.{embed}.weight", patch),
        Copy(f"{_HF_VISION}.{embed}.bias", f"{_VISION}.{embed}.bias", patch[:1]),
        Copy(
            f"{_HF_VISION}.{positions}", f"{_VISION}.{positions}", (vision.num_position_embeddings, vision.hidden_size)
        ),
        *_merger(vision, "merger", vision.hidden_size),
    ]
    for level in range(len(vision.deepstack_visual_indexes)):
        result += _merger(vision, f"deepstack_merger_list.{level}", vision.hidden_size * vision.merge_area)
    return result


def _merger(vision: VisionConfig, name: str, norm_size: int) -> list[Rule]:
    hf, to, joined = f"{_HF_VISION}.{name}", f"{_VISION}.{name}", vision.hidden_size * vision.merge_area
    return [
        Copy(f"{hf}.norm.weight", f"{to}.norm.weight", (norm_size,)),
        Copy(f"{hf}.norm.bias", f"{to}.norm.bias", (norm_size,)),
        *_linear(f"{hf}.linear_fc1", f"{to}.linear_fc1", joined, joined),
        *_linear(f"{hf}.linear_fc2", f"{to}.linear_fc2", vision.out_hidden_size, joined),
    ]


def _linear(hf: str, to: str, rows: int, columns: int, layer: int | None = None) -> list[Rule]:
    return [
        Copy(f"{hf}.weight", f"{to}.weight", (rows, columns), layer),
        Copy(f"{hf}.bias", f"{to}.bias", (rows,), layer),
    ]
