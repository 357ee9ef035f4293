"""Reading `config.json`: every published file and spelling, equal to transformers; wrong values refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3_5Config, Qwen3_5MoeConfig, Qwen3VLConfig, Qwen3VLMoeConfig, Qwen3VLMoeTextModel

from megatron_vlbridge import read_config
from megatron_vlbridge.config import Config, TextConfig, VisionConfig
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import FAMILIES

PUBLISHED = sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))
TRANSFORMERS = {
    "qwen3_vl": Qwen3VLConfig,
    "qwen3_vl_moe": Qwen3VLMoeConfig,
    "qwen3_5": Qwen3_5Config,
    "qwen3_5_moe": Qwen3_5MoeConfig,
}
DENSE = json.loads((Path(__file__).parents[1] / "data" / "configs" / "Qwen3-VL-32B-Instruct.json").read_text())
EXPERTS = json.loads((Path(__file__).parents[1] / "data" / "configs" / "Qwen3-VL-30B-A3B-Instruct.json").read_text())

SAME_TEXT_NAMES = [
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
]
SAME_VISION_NAMES = [
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "out_hidden_size",
    "num_position_embeddings",
    "initializer_range",
]
TOP_NAMES = [
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "tie_word_embeddings",
]


def assert_equals_transformers(config: Config, reference) -> None:
    for name in TOP_NAMES:
        assert getattr(config, name) == getattr(reference, name), name
    text, vision = reference.text_config, reference.vision_config
    for name in SAME_TEXT_NAMES:
        assert getattr(config.text, name) == getattr(text, name), name
    for name in SAME_VISION_NAMES:
        assert getattr(config.vision, name) == getattr(vision, name), name
    assert config.text.num_layers == text.num_hidden_layers
    assert config.text.intermediate_size == getattr(text, "intermediate_size", 0)
    assert config.text.rope_theta == text.rope_parameters["rope_theta"]
    assert list(config.text.mrope_section) == text.rope_parameters.get("mrope_section", list(config.text.mrope_section))
    assert config.text.partial_rotary_factor == text.rope_parameters.get("partial_rotary_factor", 1.0)
    assert list(config.vision.deepstack_visual_indexes) == list(getattr(vision, "deepstack_visual_indexes", []))
    if config.text.moe:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef"):
            assert getattr(config.text.moe, name) == getattr(text, name), name
        assert config.text.moe.shared_expert_intermediate_size == getattr(text, "shared_expert_intermediate_size", 0)
        assert config.text.moe.decoder_sparse_step == getattr(text, "decoder_sparse_step", 1)
        assert list(config.text.moe.mlp_only_layers) == list(getattr(text, "mlp_only_layers", []))
    if config.text.linear_attention:
        linear = config.text.linear_attention
        assert list(linear.layer_types) == text.layer_types
        for ours, theirs in {
            "conv_kernel_dim": "linear_conv_kernel_dim",
            "key_head_dim": "linear_key_head_dim",
            "value_head_dim": "linear_value_head_dim",
            "num_key_heads": "linear_num_key_heads",
            "num_value_heads": "linear_num_value_heads",
        }.items():
            assert getattr(linear, ours) == getattr(text, theirs), ours


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_file_equals_transformers(file, tmp_path):
    config = read_config(file)
    reference = TRANSFORMERS[config.model_type].from_dict(json.loads(file.read_text()))
    assert_equals_transformers(config, reference)
    assert config.dtype == "bfloat16"
    reference.save_pretrained(tmp_path)  # the same file in the spelling of transformers 5
    rewritten = read_config(tmp_path)
    assert_equals_transformers(rewritten, reference)
    assert rewritten.text.moe == config.text.moe
    assert rewritten.text.linear_attention == config.text.linear_attention


@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_absent_keys_have_the_defaults_of_transformers(model_type, tmp_path):
    reference = TRANSFORMERS[model_type]()
    hidden = reference.text_config.hidden_size
    sections = {"text_config": {}, "vision_config": {"out_hidden_size": hidden}}
    text = reference.text_config
    if 2 * sum([24, 20, 20]) != text.head_dim and model_type.startswith("qwen3_vl"):
        sections["text_config"]["head_dim"] = 128
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": model_type, **sections}))
    assert_equals_transformers(read_config(file), TRANSFORMERS[model_type](**json.loads(file.read_text())))


def spell_4_57(config: Config) -> dict:
    text, vision = config.text, config.vision
    return {
        "architectures": [config.architecture],
        "model_type": config.model_type,
        "torch_dtype": config.dtype,
        "tie_word_embeddings": config.tie_word_embeddings,
        **{name: getattr(config, name) for name in TOP_NAMES},
        "text_config": {
            "model_type": "qwen3_vl_text",
            **{name: getattr(text, name) for name in SAME_TEXT_NAMES},
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": list(text.mrope_section),
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            **{name: getattr(vision, name) for name in SAME_VISION_NAMES},
            "deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
        },
    }


def spell_5(config: Config) -> dict:
    result = spell_4_57(config)
    text = result["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    result["vision_config"]["model_type"] = "qwen3_vl_vision"
    result["vision_config"]["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    text["dtype"] = result.pop("torch_dtype")
    return result


@st.composite
def configs(draw) -> Config:
    size = st.integers(1, 64)
    section = tuple(draw(st.lists(st.integers(1, 24), min_size=3, max_size=3)))
    layers, kv = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    hidden, heads, depth = draw(size), draw(st.integers(1, 8)), draw(st.integers(1, 9))
    indexes = draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=min(layers, depth)))
    vocab = draw(st.integers(4, 200000))
    tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=4, max_size=4, unique=True))
    text = TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=draw(size),
        num_layers=layers,
        num_attention_heads=kv * draw(st.integers(1, 4)),
        num_key_value_heads=kv,
        head_dim=2 * sum(section),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([1e4, 5e5, 5e6])),
        mrope_section=section,
        partial_rotary_factor=1.0,
        max_position_embeddings=draw(size),
        initializer_range=draw(st.floats(0, 1)),
    )
    vision = VisionConfig(
        depth=depth,
        hidden_size=4 * heads * draw(st.integers(1, 9)),
        intermediate_size=draw(size),
        num_heads=heads,
        in_channels=draw(st.integers(1, 4)),
        patch_size=draw(size),
        temporal_patch_size=draw(st.integers(1, 3)),
        spatial_merge_size=draw(st.integers(1, 4)),
        out_hidden_size=hidden,
        num_position_embeddings=draw(size) ** 2,
        deepstack_visual_indexes=tuple(indexes),
        initializer_range=0.02,
    )
    names = ("Qwen3VLForConditionalGeneration", "qwen3_vl")
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    return Config(*names, text, vision, *tokens, draw(st.booleans()), dtype)


@settings(max_examples=60, deadline=None)
@given(configs())
def test_both_spellings_give_the_same_config(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("config") / "config.json"
    for spelling in (spell_4_57, spell_5):
        file.write_text(json.dumps(spelling(config)))
        assert read_config(file) == config


REFUSED = [
    ("text_config.hidden_act", "gelu", "silu"),
    ("text_config.attention_bias", True, "false"),
    ("text_config.attention_bias", 0, "false"),
    ("text_config.attention_dropout", 0.1, "Dropout"),
    ("text_config.use_sliding_window", True, "false"),
    ("text_config.is_causal", False, "true"),
    ("text_config.layer_types", ["full_attention"] * 63 + ["sliding_attention"], "64 entries"),
    ("text_config.layer_types", ["full_attention"] * 63, "64 entries"),
    ("text_config.per_layer_config", {"1": {"rms_norm_eps": 1e-5}}, "null"),
    ("text_config.pad_token_id", 151936, "at most 151935"),
    ("text_config.pad_token_id", -151937, "at least -151936"),
    ("text_config.model_type", "qwen3_text", "qwen3_vl_text"),
    ("text_config.rope_scaling.rope_type", "yarn", "default"),
    ("text_config.rope_scaling.type", "linear", "default"),
    ("text_config.rope_scaling.mrope_interleaved", False, "true"),
    ("text_config.rope_scaling.mrope_section", [24, 20], "three"),
    ("text_config.rope_scaling.mrope_section", [24, 20, 21], "rotated"),
    ("text_config.rope_scaling.mrope_section", "24,20,20", "list"),
    ("text_config.rope_scaling.rope_theta", 1e4, "rope_scaling"),
    ("text_config.rope_scaling.full_attention", {"rope_theta": 1e4}, "one setting for all layers"),
    ("text_config.rope_parameters", {"rope_type": "default", "mrope_section": [20, 24, 20]}, "rope_parameters"),
    ("text_config.rope_theta", -1, "positive"),
    ("text_config.partial_rotary_factor", 0.5, "1.0"),
    ("text_config.num_key_value_heads", 7, "divisor"),
    ("text_config.num_hidden_layers", -4, "at least 1"),
    ("text_config.num_hidden_layers", 2, "num_hidden_layers"),
    ("text_config.num_hidden_layers", 36.0, "integer"),
    ("text_config.num_hidden_layers", True, "integer"),
    ("text_config.num_hidden_layers", 1001, "at most 1000"),
    ("text_config.hidden_size", "5120", "integer"),
    ("text_config.hidden_size", 4096, "hidden_size"),
    ("text_config.rms_norm_eps", "1e-6", "number"),
    ("text_config.rms_norm_eps", 0, "positive"),
    ("text_config.rope_theta", 0.0, "positive"),
    ("text_config.rms_norm_eps", float("nan"), "number"),
    ("text_config.mtp_num_hidden_layers", 2, "one multi-token prediction layer"),
    ("text_config.dtype", "float8_e4m3fn", "bfloat16"),
    ("text_config", None, "object"),
    ("vision_config", [], "object"),
    ("vision_config.hidden_act", "silu", "gelu_pytorch_tanh"),
    ("vision_config.hidden_size", 1150, "multiple"),
    ("vision_config.num_position_embeddings", 2305, "square"),
    ("vision_config.deepstack_visual_indexes", [8, 16, 27], "depth"),
    ("vision_config.deepstack_visual_indexes", [8, 8], "distinct"),
    ("vision_config.deepstack_visual_indexes", [-1], "non-negative"),
    ("vision_config.depth", 1001, "at most 1000"),
    ("vision_config.patch_size", 0, "at least 1"),
    ("vision_config.rope_parameters", {"rope_theta": 5000.0}, "10000"),
    ("vision_config.rope_scaling", {"rope_theta": 5000.0}, "10000"),
    ("vision_config.rope_theta", 5000.0, "10000"),
    ("vision_config.head_dim", 32, "72"),
    ("vision_config.num_attention_heads", 8, "num_heads"),
    ("vision_config.num_hidden_layers", 26, "depth"),
    ("vision_config.patch_size", [16, 16], "integer"),
    ("vision_config.per_layer_config", {"1": {}}, "null"),
    ("per_layer_config", {"1": {}}, "null"),
    ("vision_config.model_type", "siglip", "qwen3_vl_vision"),
    ("image_token_id", 151936, "vocab_size"),
    ("image_token_id", 151656, "image_token_id"),
    ("video_token_id", -1, "at least 0"),
    ("tie_word_embeddings", "false", "true or false"),
    ("quantization_config", {"quant_method": "fp8"}, "quantis"),
    ("architectures", ["LlavaForConditionalGeneration"], "Qwen3VLForConditionalGeneration"),
    ("architectures", ["Qwen3_5ForConditionalGeneration"], "model_type|qwen3_5"),
    ("architectures", "Qwen3VLForConditionalGeneration", "list"),
    ("model_type", "llava", "qwen3_vl"),
]

REFUSED_EXPERTS = [
    ("text_config.num_experts_per_tok", 1, "at least 2"),
    ("text_config.num_experts_per_tok", 0, "at least 1"),
    ("text_config.num_experts_per_tok", 129, "num_experts"),
    ("text_config.num_experts", 0, "at least 1"),
    ("text_config.num_experts", 1001, "at most 1000"),
    ("text_config.num_local_experts", 64, "num_experts"),
    ("text_config.mlp_only_layers", [48], "num_hidden_layers"),
    ("text_config.mlp_only_layers", [-1], "non-negative"),
    ("text_config.decoder_sparse_step", 0, "at least 1"),
    ("text_config.norm_topk_prob", False, "true"),
    ("text_config.shared_expert_intermediate_size", 512, "shared expert"),
]
ALL_REFUSED = [(DENSE, *row) for row in REFUSED] + [(EXPERTS, *row) for row in REFUSED_EXPERTS]


@pytest.mark.parametrize(
    ("base", "key", "value", "reason"), ALL_REFUSED, ids=[f"{row[1]}-{row[2]}"[:60] for row in ALL_REFUSED]
)
def test_a_wrong_value_is_refused_with_file_key_and_value(base, key, value, reason, tmp_path):
    values = json.loads(json.dumps(base))
    *sections, last = key.split(".")
    target = values
    for name in sections:
        target = target[name]
    target[last] = value
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(VLBridgeError, match=reason) as caught:
        read_config(tmp_path)
    assert str(file) in str(caught.value)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)
    assert key.split(".")[-1] in str(caught.value)


def write(folder: Path, **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(DENSE | changes))
    return folder


@pytest.mark.parametrize("token", [None, 0, 151643])
def test_the_pad_token_is_that_of_the_text_section(token, tmp_path):
    folder = write(tmp_path, pad_token_id=5, text_config=DENSE["text_config"] | {"pad_token_id": token})
    assert read_config(folder).text.pad_token_id == token


def test_a_pad_token_counted_from_the_end(tmp_path):
    folder = write(tmp_path, text_config=DENSE["text_config"] | {"pad_token_id": -1})
    assert read_config(folder).text.pad_token_id == 151935


@pytest.mark.parametrize(("key", "other"), [("num_heads", "num_attention_heads"), ("depth", "num_hidden_layers")])
def test_the_second_name_of_a_size_of_the_tower_does_not_stand_alone(key, other, tmp_path):
    """transformers 5.23 takes `num_attention_heads: 8` for the number of heads, 5.8 its default, 16."""
    size = DENSE["vision_config"][key]
    both = write(tmp_path, vision_config=DENSE["vision_config"] | {other: size})
    assert getattr(read_config(both).vision, key) == size
    alone = {name: value for name, value in DENSE["vision_config"].items() if name != key} | {other: size}
    with pytest.raises(VLBridgeError, match=rf"vision_config.{other}: expected the same under the name {key}, found"):
        read_config(write(tmp_path, vision_config=alone))


def test_full_attention_in_every_layer_may_be_said(tmp_path):
    text = DENSE["text_config"] | {"layer_types": ["full_attention"] * 64, "sliding_window": 4096}
    assert read_config(write(tmp_path, text_config=text)) == read_config(write(tmp_path))


@pytest.mark.parametrize("changes", [{"architectures": ["LlavaModel"]}, {"architectures": [], "model_type": "llava"}])
def test_only_supported_architectures_are_recommended(changes, tmp_path):
    with pytest.raises(VLBridgeError) as caught:
        read_config(write(tmp_path, **changes))
    named = set(re.findall(r"\w+ForConditionalGeneration", str(caught.value)))
    assert named == {family.architecture for family in FAMILIES}


@pytest.mark.parametrize(("step", "dense"), [(1, []), (2, []), (3, [2]), (2, [5, 0, 3]), (7, [])])
def test_the_layers_with_experts_are_those_of_transformers(step, dense, tmp_path):
    text = {"num_hidden_layers": 6, "decoder_sparse_step": step, "mlp_only_layers": dense}
    values = EXPERTS | {"text_config": EXPERTS["text_config"] | text}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        layers = Qwen3VLMoeTextModel(Qwen3VLMoeConfig(**values).text_config).layers
    moe = read_config(tmp_path).text.moe
    assert [moe.is_moe_layer(layer) for layer in range(6)] == [hasattr(layer.mlp, "experts") for layer in layers]


def test_only_the_top_level_decides_tying(tmp_path):
    nested = DENSE["text_config"]
    assert not read_config(write(tmp_path, text_config=nested | {"tie_word_embeddings": True})).tie_word_embeddings
    tied = write(tmp_path, tie_word_embeddings=True, text_config=nested | {"tie_word_embeddings": False})
    assert read_config(tied).tie_word_embeddings


def test_tying_said_only_in_the_text_section_is_refused(tmp_path):
    changes = {"tie_word_embeddings": None, "text_config": DENSE["text_config"] | {"tie_word_embeddings": True}}
    with pytest.raises(VLBridgeError, match="tie_word_embeddings"):
        read_config(write(tmp_path, **changes))


def test_disagreeing_spellings_are_refused(tmp_path):
    with pytest.raises(VLBridgeError, match="torch_dtype"):
        read_config(write(tmp_path, dtype="bfloat16", torch_dtype="float32"))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(VLBridgeError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(VLBridgeError, match="no such file"):
        read_config(tmp_path)
