"""From the raw `config.json` to a `Config`: the spellings, the defaults, and what must agree."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vlbridge.config.families import FAMILIES, Family
from megatron_vlbridge.config.schema import Config, LinearAttentionConfig, MoeConfig, TextConfig, VisionConfig
from megatron_vlbridge.config.section import Section
from megatron_vlbridge.errors import VLBridgeError

_DTYPES = ("float32", "bfloat16", "float16")
# Each has rules of its own, which are made before a tensor is looked at: a number from a stranger must not fill memory.
_MOST_LAYERS = _MOST_EXPERTS = 1000
_LAYER_KINDS = ("linear_attention", "full_attention")


def read_config(path: str | Path) -> Config:
    """Read a Hugging Face `config.json` into a `Config`.

    `path` is a checkpoint folder or the file itself. Nothing but that file is read and no transformers class is asked,
    so the installed version of transformers has no part in the answer.

    Raises VLBridgeError, with file, key, value, what was expected and a remedy, for a missing or malformed file, an
    architecture that is not known, a value that matters and is not supported, and values that contradict each other.

    Example: `read_config("Qwen3-VL-2B-Instruct").text.num_layers` is 28.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    top = Section(file, _read_json_object(file))
    top.only("per_layer_config", None)
    model_type, family = _find_family(top)
    text = _read_text(top.section("text_config"), model_type, family)
    vision = _read_vision(top.section("vision_config"), model_type)
    config = Config(
        architecture=family.architecture,
        model_type=model_type,
        text=text,
        vision=vision,
        image_token_id=top.integer("image_token_id", default=family.token_defaults[0], minimum=0),
        video_token_id=top.integer("video_token_id", default=family.token_defaults[1], minimum=0),
        vision_start_token_id=top.integer("vision_start_token_id", default=family.token_defaults[2], minimum=0),
        vision_end_token_id=top.integer("vision_end_token_id", default=family.token_defaults[3], minimum=0),
        tie_word_embeddings=_read_tie(top),
        dtype=_read_dtype(top),
        fp8=_read_fp8(top),
    )
    _check_parts_fit(top, config)
    return config


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        if file.exists() and not file.is_file():
            raise OSError("no regular file")  # reading a pipe or device may never end
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VLBridgeError(
            f"{file}: expected a config.json, found no such file. Give a checkpoint's folder."
        ) from error
    # ValueError is bytes that are no text, text that is no JSON, or an integer of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise VLBridgeError(f"{file}: expected a JSON file, found: {error}. Fetch the file again.") from error
    if not isinstance(values, dict):
        raise VLBridgeError(f"{file}: expected a JSON object, found {type(values).__name__}. Fetch the file again.")
    return values


def _find_family(top: Section) -> tuple[str, Family]:
    """The family named by `architectures` and `model_type`, which must agree; either may be absent."""
    named = top.value("architectures", default=[])
    if not isinstance(named, list) or len(named) > 1 or any(not isinstance(name, str) for name in named):
        raise top.fail("architectures", named, "a list with one name", "Name the one architecture of the checkpoint.")
    by_name = {family.architecture: model_type for model_type, family in FAMILIES.items()}
    supported = {model_type: family for model_type, family in FAMILIES.items() if family.supported}
    architectures = ", ".join(family.architecture for family in supported.values())
    remedy = f"Supported architectures: {architectures}."
    if named and named[0] not in by_name:
        raise top.fail("architectures", named[0], "a supported architecture", remedy)
    model_type = top.value("model_type", default=by_name[named[0]] if named else None)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise top.fail("model_type", model_type, f"one of {', '.join(supported)}", remedy)
    if named and by_name[named[0]] != model_type:
        expected = f"{by_name[named[0]]!r}, as architectures names {named[0]}"
        raise top.fail("model_type", model_type, expected, "Correct whichever is wrong.")
    return model_type, FAMILIES[model_type]


def _read_tie(top: Section) -> bool:
    """Only the top level counts, as in transformers, which writes either value beside it into `text_config`."""
    nested = top.section("text_config").value("tie_word_embeddings")
    if top.value("tie_word_embeddings") is None and nested is True:
        remedy = "transformers reads only the top level (false when absent): say there which of the two is meant."
        raise top.fail("tie_word_embeddings", None, "the value that text_config has, true", remedy)
    return top.boolean("tie_word_embeddings", False)


def _read_dtype(top: Section) -> str:
    text = top.section("text_config")
    dtype = top.value("dtype", "torch_dtype", default=text.value("dtype", "torch_dtype", default="float32"))
    if dtype not in _DTYPES:
        raise top.fail("dtype", dtype, f"one of {', '.join(_DTYPES)}", "Convert the checkpoint to one of these first.")
    return str(dtype)


def _read_fp8(top: Section) -> bool:
    """Whether weights are quantised, which must be to FP8 in blocks of 128 x 128.

    Which modules are not (`modules_to_not_convert`) is not asked: the tensors' own dtypes say it.
    """
    if top.value("quantization_config") is None:
        return False
    values = top.section("quantization_config")
    needed: dict[str, object] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    optional: dict[str, object] = {"activation_scheme": "dynamic", "fmt": "e4m3", "expert_dtype": "fp8"}
    for key, expected in (needed | optional).items():
        value = values.value(key, default=optional.get(key))
        if value != expected:
            remedy = "Of quantised checkpoints only FP8 in blocks of 128 x 128 is supported: use the unquantised one."
            raise values.fail(key, value, repr(expected), remedy)
    return True


def _read_rope(text: Section, defaults: Mapping[str, Any]) -> tuple[float, tuple[int, int, int], float]:
    """`(rope_theta, mrope_section, partial_rotary_factor)`, from `rope_parameters` or `rope_theta` + `rope_scaling`."""
    rope = _rope_section(text)
    rope.only("rope_type", "default")
    rope.only("type", "default")
    rope.only("mrope_interleaved", True)
    theta = rope.number("rope_theta", default=text.number("rope_theta", default=defaults["rope_theta"]))
    section = rope.integers("mrope_section", defaults["mrope_section"])
    if len(section) != 3:
        raise rope.fail("mrope_section", list(section), "three integers (time, height, width)", "Correct the value.")
    factor = defaults["partial_rotary_factor"]
    factor = rope.number("partial_rotary_factor", default=text.number("partial_rotary_factor", default=factor))
    return theta, (section[0], section[1], section[2]), factor


def _rope_section(part: Section) -> Section:
    """What `rope_parameters` and `rope_scaling` of a part say together; what stands beside them must agree."""
    new, old = part.section("rope_parameters", required=False), part.section("rope_scaling", required=False)
    for key in old.values.keys() & new.values.keys():
        if old.values[key] != new.values[key]:
            raise old.fail(key, old.values[key], f"{new.values[key]!r} as in rope_parameters", "Remove the wrong one.")
    prefix = part.prefix + ("rope_parameters." if new.values else "rope_scaling.")
    rope = Section(part.file, {**old.values, **new.values}, prefix)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope.values and part.value(key, default=rope.values[key]) != rope.values[key]:
            raise part.fail(
                key, part.value(key), f"{rope.values[key]!r} as in {rope.prefix}{key}", "Remove the wrong one."
            )
    for key, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.fail(key, value, "one setting for all layers", "Settings of single layers are not supported.")
    return rope


def _check_fixed(text: Section, model_type: str) -> None:
    """Settings of the language model that have one supported value."""
    text.only("model_type", f"{model_type}_text")
    text.only("hidden_act", "silu")
    text.only("attention_bias", False)
    text.only("use_sliding_window", False)
    text.only("is_causal", True)
    text.only("per_layer_config", None)
    if text.number("attention_dropout", default=0.0, positive=False) != 0:
        raise text.fail(
            "attention_dropout", text.value("attention_dropout"), "0", "Dropout is not supported: set it to 0."
        )


def _read_text(text: Section, model_type: str, family: Family) -> TextConfig:
    defaults = family.text_defaults
    _check_fixed(text, model_type)

    def size(key: str) -> int:
        return text.integer(key, default=defaults.get(key))

    layers = text.integer("num_hidden_layers", default=defaults["num_hidden_layers"], maximum=_MOST_LAYERS)
    heads = size("num_attention_heads")
    kv_default = (
        heads if "num_key_value_heads" in text.values else defaults["num_key_value_heads"]
    )  # null means: as many
    theta, section, factor = _read_rope(text, defaults)
    result = TextConfig(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size") if "intermediate_size" in defaults else 0,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=text.integer("num_key_value_heads", default=kv_default),
        head_dim=text.integer("head_dim", default=defaults["head_dim"] or size("hidden_size") // heads),
        rms_norm_eps=text.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        mrope_section=section,
        partial_rotary_factor=factor,
        max_position_embeddings=size("max_position_embeddings"),
        initializer_range=text.number("initializer_range", default=0.02, positive=False),
        attention_output_gate=family.has_linear_attention,
        num_mtp_layers=text.integer("mtp_num_hidden_layers", "num_mtp_layers", default=0, minimum=0),
        moe=_read_moe(text, defaults, layers) if family.has_moe else None,
        linear_attention=_read_linear_attention(text, layers) if family.has_linear_attention else None,
        pad_token_id=_read_pad_token(text, size("vocab_size")),
    )
    if not family.has_linear_attention:
        _check_layer_types(text, layers)
    text.only("attn_output_gate", family.has_linear_attention)
    text.only("mtp_use_dedicated_embeddings", False)
    _check_text(text, result, partial=family.has_linear_attention)
    return result


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


def _check_text(text: Section, result: TextConfig, partial: bool) -> None:
    if result.num_attention_heads % result.num_key_value_heads:
        expected = f"a divisor of num_attention_heads ({result.num_attention_heads})"
        raise text.fail("num_key_value_heads", result.num_key_value_heads, expected, "Correct the value in the file.")
    if not (result.partial_rotary_factor == 1.0 or (partial and result.partial_rotary_factor < 1.0)):
        expected = "a factor of at most 1" if partial else "1.0"
        raise text.fail(
            "partial_rotary_factor", result.partial_rotary_factor, expected, "Correct the value in the file."
        )
    if 2 * sum(result.mrope_section) != result.rotary_dim:
        expected = f"a sum of {result.rotary_dim / 2:g}, half of the {result.rotary_dim} rotated dimensions of a head"
        raise text.fail("mrope_section", list(result.mrope_section), expected, "Correct mrope_section or head_dim.")
    if result.num_mtp_layers > 1:
        remedy = "Only one multi-token prediction layer is supported."
        raise text.fail("mtp_num_hidden_layers", result.num_mtp_layers, "0 or 1", remedy)


def _read_moe(text: Section, defaults: Mapping[str, Any], num_layers: int) -> MoeConfig:
    text.only("norm_topk_prob", True)  # transformers always renormalises
    moe = MoeConfig(
        num_experts=text.integer(
            "num_experts", "num_local_experts", default=defaults["num_experts"], maximum=_MOST_EXPERTS
        ),
        num_experts_per_tok=_read_experts_per_token(text, defaults["num_experts_per_tok"]),
        moe_intermediate_size=text.integer("moe_intermediate_size", default=defaults["moe_intermediate_size"]),
        shared_expert_intermediate_size=text.integer(
            "shared_expert_intermediate_size", default=defaults["shared_expert_intermediate_size"], minimum=0
        ),
        decoder_sparse_step=text.integer("decoder_sparse_step", default=1),
        mlp_only_layers=text.integers("mlp_only_layers", []),
        router_aux_loss_coef=text.number("router_aux_loss_coef", default=0.001, positive=False),
    )
    if moe.num_experts_per_tok > moe.num_experts:
        expected = f"at most num_experts ({moe.num_experts})"
        raise text.fail("num_experts_per_tok", moe.num_experts_per_tok, expected, "Correct the value in the file.")
    if any(layer >= num_layers for layer in moe.mlp_only_layers):
        expected = f"layers below num_hidden_layers ({num_layers})"
        raise text.fail("mlp_only_layers", list(moe.mlp_only_layers), expected, "Correct the value in the file.")
    if defaults["shared_expert_intermediate_size"] == 0 and moe.shared_expert_intermediate_size:
        found = moe.shared_expert_intermediate_size
        raise text.fail("shared_expert_intermediate_size", found, "0", "This family has no shared expert.")
    return moe


def _read_experts_per_token(text: Section, default: int) -> int:
    found = text.integer("num_experts_per_tok", default=default)
    if found == 1:
        remedy = (
            "The weight of a single expert is renormalised to 1, so that its router cannot learn, and Megatron-Core "
            "does not run such a router: use a checkpoint that takes several experts."
        )
        raise text.fail("num_experts_per_tok", found, "an integer of at least 2", remedy)
    return found


def _read_linear_attention(text: Section, num_layers: int) -> LinearAttentionConfig:
    text.only("mamba_ssm_dtype", "float32")
    interval = text.integer("full_attention_interval", default=4)
    kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)]
    layer_types = text.value("layer_types", default=kinds)
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not set(layer_types) <= set(_LAYER_KINDS):
        expected = f"{num_layers} entries (num_hidden_layers), each {' or '.join(_LAYER_KINDS)}"
        raise text.fail("layer_types", layer_types, expected, "Correct the value in the file.")
    if "full_attention_interval" in text.values and layer_types != kinds:
        expected = f"full attention at every layer {interval}, as full_attention_interval says"
        raise text.fail("layer_types", layer_types, expected, "Remove whichever is wrong.")
    result = LinearAttentionConfig(
        layer_types=tuple(layer_types),
        conv_kernel_dim=text.integer("linear_conv_kernel_dim", default=4),
        key_head_dim=text.integer("linear_key_head_dim", default=128),
        value_head_dim=text.integer("linear_value_head_dim", default=128),
        num_key_heads=text.integer("linear_num_key_heads", default=16),
        num_value_heads=text.integer("linear_num_value_heads", default=32),
    )
    if result.num_value_heads % result.num_key_heads:
        expected = f"a multiple of linear_num_key_heads ({result.num_key_heads})"
        raise text.fail("linear_num_value_heads", result.num_value_heads, expected, "Correct the value in the file.")
    return result


def _read_vision(vision: Section, model_type: str) -> VisionConfig:
    vision.only("model_type", f"{model_type}_vision", model_type)
    vision.only("hidden_act", "gelu_pytorch_tanh")
    vision.only("per_layer_config", None)
    rope = _rope_section(vision)
    rope.only("rope_type", "axial", "default")
    rope.only("type", "default", "axial")
    for part in (rope, vision):
        if part.number("rope_theta", default=10000.0) != 10000.0:
            raise part.fail("rope_theta", part.value("rope_theta"), "10000", "Other values are not supported.")
    deepstack_default = [8, 16, 24] if model_type.startswith("qwen3_vl") else []
    result = VisionConfig(
        depth=_read_size_of_two_names(vision, "depth", "num_hidden_layers", default=27, maximum=_MOST_LAYERS),
        hidden_size=vision.integer("hidden_size", default=1152),
        intermediate_size=vision.integer("intermediate_size", default=4304),
        num_heads=_read_size_of_two_names(vision, "num_heads", "num_attention_heads", default=16),
        in_channels=vision.integer("in_channels", default=3),
        patch_size=vision.integer("patch_size", default=16),
        temporal_patch_size=vision.integer("temporal_patch_size", default=2),
        spatial_merge_size=vision.integer("spatial_merge_size", default=2),
        out_hidden_size=vision.integer("out_hidden_size", default=3584),
        num_position_embeddings=vision.integer("num_position_embeddings", default=2304),
        deepstack_visual_indexes=vision.integers("deepstack_visual_indexes", deepstack_default),
        initializer_range=vision.number("initializer_range", default=0.02, positive=False),
    )
    _check_vision(vision, result)
    if not deepstack_default and result.deepstack_visual_indexes:
        found = list(result.deepstack_visual_indexes)
        raise vision.fail("deepstack_visual_indexes", found, "[]", "This family has no deepstack.")
    return result


def _read_size_of_two_names(vision: Section, name: str, other: str, **limits: int) -> int:
    """A size that transformers 5.23 reads under both names, where 5.8 takes its default if `name` is missing."""
    if vision.value(name) is None and vision.value(other) is not None:
        remedy = "Not every transformers reads this one: rename it."
        raise vision.fail(other, vision.value(other), f"the same under the name {name}", remedy)
    return vision.integer(name, other, **limits)


def _check_vision(vision: Section, result: VisionConfig) -> None:
    if result.hidden_size % (
        4 * result.num_heads
    ):  # a quarter of a head's frequencies each for cos/sin of height and width
        expected = f"a multiple of 4 x num_heads ({4 * result.num_heads})"
        raise vision.fail("hidden_size", result.hidden_size, expected, "Correct hidden_size or num_heads.")
    vision.only("head_dim", result.hidden_size // result.num_heads)
    if math.isqrt(result.num_position_embeddings) ** 2 != result.num_position_embeddings:
        found = result.num_position_embeddings
        raise vision.fail("num_position_embeddings", found, "a square number", "Correct the value in the file.")
    indexes = result.deepstack_visual_indexes
    if len(set(indexes)) != len(indexes) or any(index >= result.depth for index in indexes):
        expected = f"distinct block numbers below depth ({result.depth})"
        raise vision.fail("deepstack_visual_indexes", list(indexes), expected, "Correct the value in the file.")


def _check_parts_fit(top: Section, config: Config) -> None:
    """What the two towers and the tokens must agree on."""
    text, vision = config.text, config.vision
    if vision.out_hidden_size != text.hidden_size:
        expected = f"text_config.hidden_size ({text.hidden_size})"
        raise top.fail("vision_config.out_hidden_size", vision.out_hidden_size, expected, "Correct whichever is wrong.")
    if len(vision.deepstack_visual_indexes) > text.num_layers:
        found, expected = (
            list(vision.deepstack_visual_indexes),
            f"at most {text.num_layers} entries (num_hidden_layers)",
        )
        raise top.fail("vision_config.deepstack_visual_indexes", found, expected, "Correct whichever is wrong.")
    seen: dict[int, str] = {}
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        token = getattr(config, key)
        if token >= text.vocab_size:
            raise top.fail(key, token, f"an id below vocab_size ({text.vocab_size})", "Correct the id or vocab_size.")
        if token in seen:
            raise top.fail(key, token, f"another id than {seen[token]}", "Give every vision token its own id.")
        seen[token] = key
