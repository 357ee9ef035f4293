"""The config.json of a family with linear attention: what contradicts itself or is not supported is rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3_5Config, Qwen3_5MoeConfig

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.checkpoint.inspect import inspect, table_lines
from megatron_vlbridge.errors import VLBridgeError
from tests import reference
from tests.unit.test_mtp_weights import without_mtp

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
DENSE, EXPERTS = (json.loads((CONFIGS / f"Qwen3.5-{name}.json").read_text()) for name in ("27B", "35B-A3B"))
LAYERS = DENSE["text_config"]["num_hidden_layers"]

REJECTED: list[tuple[dict[str, Any], str, Any, str]] = [
    (DENSE, "layer_types", ["full_attention", "linear_attention"] * (LAYERS // 2), "full_attention_interval"),
    (DENSE, "layer_types", ["mamba"] * LAYERS, "linear_attention or full_attention"),
    (DENSE, "layer_types", ["linear_attention"] * (LAYERS - 1), f"{LAYERS} entries"),
    (DENSE, "full_attention_interval", 2 * LAYERS, "at least one layer of each"),
    (DENSE, "full_attention_interval", 1, "at least one layer of each"),
    (DENSE, "linear_num_value_heads", 40, "a multiple of linear_num_key_heads"),
    (DENSE, "linear_conv_kernel_dim", 0, "at least 1"),
    (DENSE, "mamba_ssm_dtype", "bfloat16", "float32"),
    (DENSE, "attn_output_gate", False, "true"),
    (DENSE, "mtp_num_hidden_layers", 2, "0 or 1"),
    (DENSE, "mtp_use_dedicated_embeddings", True, "false"),
    (EXPERTS, "mlp_only_layers", [0], r"\[\],"),
    (EXPERTS, "decoder_sparse_step", 2, "1"),
]


def write(folder: Path, values: dict[str, Any], key: str, value: object) -> Path:
    text = dict(values["text_config"])
    if key == "full_attention_interval":
        text.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(values | {"text_config": text | {key: value}}))
    return folder


@pytest.mark.parametrize(
    ("base", "key", "value", "expected"), REJECTED, ids=[f"{row[1]}-{row[2]}"[:60] for row in REJECTED]
)
def test_a_wrong_value_is_rejected(base, key, value, expected, tmp_path):
    with pytest.raises(VLBridgeError, match=rf"config\.json: text_config\.\w+: expected .*{expected}"):
        read_config(write(tmp_path, base, key, value))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}, "without a vision tower"),
        ({"architectures": None, "model_type": "qwen3_5_moe_text"}, "without a vision tower"),
        ({"architectures": ["Qwen4ExpForConditionalGeneration"], "model_type": "qwen4_exp"}, "hyper-connections"),
        ({"architectures": None, "model_type": "qwen4_exp"}, "sparse attention"),
    ],
)
def test_relatives_are_rejected_by_name_with_what_is_missing(changes, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DENSE | changes))
    with pytest.raises(VLBridgeError, match=reason) as caught:
        read_config(tmp_path)
    assert changes["model_type"] in str(caught.value) or changes["architectures"][0] in str(caught.value)


@pytest.mark.parametrize("make", [Qwen3_5Config, Qwen3_5MoeConfig])
def test_the_layers_are_those_of_transformers(make, tmp_path):
    for interval in (2, 3, 4):
        config = make(text_config={"num_hidden_layers": 7, "full_attention_interval": interval})
        config.vision_config.out_hidden_size = config.text_config.hidden_size
        config.save_pretrained(tmp_path)
        linear = [kind.linear_attention for kind in read_config(tmp_path).text.layer_kinds]
        assert linear == [name == "linear_attention" for name in config.text_config.layer_types]


def test_a_checkpoint_that_lost_its_mtp_tensors_is_rejected_with_a_remedy(tmp_path):
    """As transformers writes it: the config has the layer, the files do not."""
    source = without_mtp(tmp_path / "hf", linear={})
    with pytest.raises(VLBridgeError, match=r"mtp\.\*: expected .* found none.*set mtp_num_hidden_layers to 0"):
        import_checkpoint(source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_inspect_counts_the_kinds_of_layers(tmp_path):
    found = inspect(reference.write_checkpoint(tmp_path / "hf", linear={}, experts={}))
    assert found.layers == {"linear attention and experts": 3, "full attention and experts": 1}
    assert "3 layers with linear attention and experts" in table_lines(found)
    assert found.as_json()["layers"] == found.layers
