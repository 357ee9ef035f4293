"""`text_config` -> `TextConfig`."""

from megatron_vlbridge.config.schema import LinearAttentionConfig, MoeConfig, TextConfig
from megatron_vlbridge.config.section import MAX_EXPERTS, MAX_LAYERS, Section, rope_section

_LAYER_TYPES = ("linear_attention", "full_attention")


def read_text(text: Section, model_type: str) -> TextConfig:
    """The language model of a checkpoint of `model_type`."""
    _check_fixed(text, model_type)
    layers = text.integer("num_hidden_layers", maximum=MAX_LAYERS)
    heads = text.integer("num_attention_heads")
    # null means: as many as there are heads
    kv_heads = heads if text.values.get("num_key_value_heads", heads) is None else None
    theta, section, factor = _read_rope(text)
    linear = "full_attention_interval" in text.defaults
    gated = bool(text.defaults.get("attn_output_gate"))
    result = TextConfig(
        vocab_size=text.integer("vocab_size"),
        hidden_size=text.integer("hidden_size"),
        intermediate_size=text.integer("intermediate_size") if "intermediate_size" in text.defaults else 0,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or text.integer("num_key_value_heads"),
        head_dim=text.integer("head_dim", default=text.integer("hidden_size") // heads),
        rms_norm_eps=text.number("rms_norm_eps"),
        rope_theta=theta,
        mrope_section=section,
        partial_rotary_factor=factor,
        max_position_embeddings=text.integer("max_position_embeddings"),
        initializer_range=text.number("initializer_range", positive=False),
        attention_output_gate=gated,
        num_mtp_layers=text.integer("mtp_num_hidden_layers", "num_mtp_layers", minimum=0),
        moe=_read_moe(text, layers) if "num_experts" in text.defaults else None,
        linear_attention=_read_linear_attention(text, layers) if linear else None,
        pad_token_id=_read_pad_token(text, text.integer("vocab_size")),
    )
    if not linear:
        _check_layer_types(text, layers)
    text.only("attn_output_gate", gated)
    text.only("mtp_use_dedicated_embeddings", False)
    _check_text(text, result)
    return result


def _read_rope(text: Section) -> tuple[float, tuple[int, int, int], float]:
    """`(rope_theta, mrope_section, partial_rotary_factor)` of the language model."""
    rope = rope_section(text)
    rope.only("rope_type", "default")
    rope.only("type", "default")
    rope.only("mrope_interleaved", True)
    theta = rope.number("rope_theta", default=text.number("rope_theta"))
    section = rope.integers("mrope_section", default=text.defaults["mrope_section"])
    if len(section) != 3:
        raise rope.fail("mrope_section", list(section), "three integers (time, height, width)", "Correct the value.")
    factor = rope.number("partial_rotary_factor", default=text.number("partial_rotary_factor", default=1.0))
    return theta, (section[0], section[1], section[2]), factor


def _check_fixed(text: Section, model_type: str) -> None:
    """Settings of the language model that have one supported value."""
    text.only("model_type", f"{model_type}_text")
    text.only("hidden_act", "silu")
    text.only("attention_bias", False)
    text.only("use_sliding_window", False)
    text.only("is_causal", True)
    text.only("per_layer_config", None)
    if text.number("attention_dropout", default=0.0, positive=False) != 0:
        found = text.value("attention_dropout")
        raise text.fail("attention_dropout", found, "0", "Dropout is not supported: set it to 0.")


def _read_pad_token(text: Section, vocab_size: int) -> int | None:
    """The token whose embedding gets no gradient, which transformers also counts from the end (-1: the last)."""
    if text.value("pad_token_id") is None:
        return None
    return text.integer("pad_token_id", minimum=-vocab_size, maximum=vocab_size - 1) % vocab_size


def _check_layer_types(text: Section, num_layers: int) -> None:
    found = text.value("layer_types")
    if found is not None and found != ["full_attention"] * num_layers:
        expected = f"{num_layers} entries (num_hidden_layers), each full_attention"
        raise text.fail("layer_types", found, expected, "Remove layer_types, or use a checkpoint of full attention.")


def _check_text(text: Section, result: TextConfig) -> None:
    partial = "partial_rotary_factor" in text.defaults
    if result.num_attention_heads % result.num_key_value_heads:
        expected = f"a divisor of num_attention_heads ({result.num_attention_heads})"
        raise text.fail("num_key_value_heads", result.num_key_value_heads, expected)
    if not (result.partial_rotary_factor == 1.0 or (partial and result.partial_rotary_factor < 1.0)):
        expected = "a factor of at most 1" if partial else "1.0"
        raise text.fail("partial_rotary_factor", result.partial_rotary_factor, expected)
    if 2 * sum(result.mrope_section) != result.rotary_dim:
        expected = f"a sum of {result.rotary_dim / 2:g}, half of the {result.rotary_dim} rotated dimensions of a head"
        raise text.fail("mrope_section", list(result.mrope_section), expected, "Correct mrope_section or head_dim.")
    if result.num_mtp_layers > 1:
        remedy = "Only one multi-token prediction layer is supported."
        raise text.fail("mtp_num_hidden_layers", result.num_mtp_layers, "0 or 1", remedy)


def _read_moe(text: Section, num_layers: int) -> MoeConfig:
    text.only("norm_topk_prob", True)  # transformers always renormalises
    if "decoder_sparse_step" not in text.defaults:
        text.only("decoder_sparse_step", 1)
        text.only("mlp_only_layers", [])
    moe = MoeConfig(
        num_experts=text.integer("num_experts", "num_local_experts", maximum=MAX_EXPERTS),
        num_experts_per_tok=text.integer("num_experts_per_tok"),
        moe_intermediate_size=text.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=text.integer("shared_expert_intermediate_size", default=0, minimum=0),
        decoder_sparse_step=text.integer("decoder_sparse_step", default=1),
        mlp_only_layers=text.integers("mlp_only_layers", default=[]),
        router_aux_loss_coef=text.number("router_aux_loss_coef", positive=False),
    )
    if moe.num_experts_per_tok == 1:
        remedy = (
            "The weight of a single expert is renormalised to 1, so that its router cannot learn, and Megatron-Core "
            "does not run such a router: use a checkpoint that takes several experts."
        )
        raise text.fail("num_experts_per_tok", 1, "an integer of at least 2", remedy)
    if moe.num_experts_per_tok > moe.num_experts:
        expected = f"at most num_experts ({moe.num_experts})"
        raise text.fail("num_experts_per_tok", moe.num_experts_per_tok, expected)
    if any(layer >= num_layers for layer in moe.mlp_only_layers):
        expected = f"layers below num_hidden_layers ({num_layers})"
        raise text.fail("mlp_only_layers", list(moe.mlp_only_layers), expected)
    if "shared_expert_intermediate_size" not in text.defaults and moe.shared_expert_intermediate_size:
        found = moe.shared_expert_intermediate_size
        raise text.fail("shared_expert_intermediate_size", found, "0", "This family has no shared expert.")
    return moe


def _read_linear_attention(text: Section, num_layers: int) -> LinearAttentionConfig:
    text.only("mamba_ssm_dtype", "float32")
    interval = text.integer("full_attention_interval")
    kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)]
    layer_types = text.value("layer_types", default=kinds)
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not set(layer_types) <= set(_LAYER_TYPES):
        expected = f"{num_layers} entries (num_hidden_layers), each {' or '.join(_LAYER_TYPES)}"
        raise text.fail("layer_types", layer_types, expected)
    if "full_attention_interval" in text.values and layer_types != kinds:
        expected = f"full attention at every layer {interval}, as full_attention_interval says"
        raise text.fail("layer_types", layer_types, expected, "Remove whichever is wrong.")
    if set(layer_types) != set(_LAYER_TYPES):
        expected = f"{' and '.join(_LAYER_TYPES)}, at least one layer of each"
        raise text.fail("layer_types", layer_types, expected, "Models of one kind alone are not supported.")
    result = LinearAttentionConfig(
        layer_types=tuple(layer_types),
        conv_kernel_dim=text.integer("linear_conv_kernel_dim"),
        key_head_dim=text.integer("linear_key_head_dim"),
        value_head_dim=text.integer("linear_value_head_dim"),
        num_key_heads=text.integer("linear_num_key_heads"),
        num_value_heads=text.integer("linear_num_value_heads"),
    )
    if result.num_value_heads % result.num_key_heads:
        expected = f"a multiple of linear_num_key_heads ({result.num_key_heads})"
        raise text.fail("linear_num_value_heads", result.num_value_heads, expected)
    return result
