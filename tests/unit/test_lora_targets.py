"""Which weights get an adapter, by the names of published models, and what is not a target."""

from pathlib import Path

import pytest

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.peft.manifest import (
    ADAPTER_MANIFEST,
    AdapterManifest,
    read_adapter_manifest,
    write_adapter_manifest,
)
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.lora.attach import lora_settings
from megatron_vlbridge.model.lora.targets import select_weights
from megatron_vlbridge.weights.adapters import adapter_shape, adapter_table, adapter_tensor, weight_of

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
DENSE, EXPERTS = (read_config(CONFIGS / f"Qwen3-VL-{name}-Instruct.json") for name in ("2B", "30B-A3B"))
LINEAR = read_config(CONFIGS / "Qwen3.5-35B-A3B.json")
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = "model.language_model.layers"


def test_names_are_those_of_the_decoder_layers() -> None:
    assert select_weights(DENSE, ["q_proj", "mlp.down_proj"]) == [
        f"{LAYERS}.{layer}.{module}.weight" for layer in range(28) for module in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert select_weights(DENSE) == select_weights(DENSE, SEVEN) == select_weights(DENSE, [*SEVEN, *SEVEN])


def test_paths_and_regular_expressions_reach_everything() -> None:
    path = f"{LAYERS}.3.self_attn.q_proj"
    assert select_weights(DENSE, [path]) == [f"{path}.weight"]
    found = select_weights(DENSE, [r".*layers\.[01]\.self_attn\.[qv]_proj", r".*blocks\.2\.attn\.proj"])
    assert len(found) == 5
    assert found[-1] == "model.visual.blocks.2.attn.proj.weight"
    assert select_weights(DENSE, [r".*layers\.3\.self_attn\.q_proj"]) == [f"{path}.weight"]
    assert select_weights(LINEAR, ["mtp.fc", path]) == [f"{path}.weight", "mtp.fc.weight"]
    assert len(select_weights(LINEAR, [r"mtp\.layers.*q_proj"])) == 1


def test_the_vision_tower_by_option() -> None:
    tower = set(select_weights(DENSE, vision=True)) - set(select_weights(DENSE))
    ends = {name.removeprefix("model.visual.").split(".", 2)[-1] for name in tower if ".blocks." in name}
    assert ends == {"attn.qkv.weight", "attn.proj.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
    assert len(tower) == 4 * 24 + 2 * 4
    assert not [name for name in tower if "embed" in name or "norm" in name]
    assert set(select_weights(DENSE, ["attn.qkv"], vision=True)) < tower


def test_experts_are_named_as_parameters() -> None:
    names = [f"{LAYERS}.{layer}.mlp.experts.gate_up_proj" for layer in range(48)]
    assert select_weights(EXPERTS, ["mlp.experts.gate_up_proj"]) == names
    assert select_weights(EXPERTS, ["experts.gate_up_proj"]) == names
    assert len(select_weights(EXPERTS)) == 48 * 6
    assert not [name for name in select_weights(EXPERTS) + select_weights(LINEAR) if "gate.weight" in name]
    with pytest.raises(VLBridgeError, match=r"'down_proj'.*found none.*mlp\.experts\.down_proj"):
        select_weights(EXPERTS, ["q_proj", "down_proj"])
    # Of the shared expert alone.
    assert all(".shared_expert." in name for name in select_weights(LINEAR, ["down_proj"]))


def test_linear_attention() -> None:
    found = {name.split(".")[-2] for name in select_weights(LINEAR) if ".linear_attn." in name}
    assert found == {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}


@pytest.mark.parametrize(
    ("targets", "vision", "stated"),
    [
        ([], False, "expected a list of at least one, found none"),
        ("q_proj", False, "expected a list of at least one, found q_proj"),
        (
            ["q_pro"],
            False,
            r"'q_pro': expected a projection of the decoder layers, found none\. Use some of down",
        ),
        (["proj"], False, r"'proj'.*found none, but model\.visual\.patch_embed\.proj, .* and 22 more outside of them"),
        (["proj"], True, r"'proj': expected only projections, found model\.visual\.patch_embed\.proj too"),
        ([r"model\.visual\..*proj"], False, r"found model\.visual\.patch_embed\.proj too"),
        (["input_layernorm"], False, r"found model\.language_model\.layers\.0\.input_layernorm, .* and 25 more too"),
        (["lm_head"], False, "'lm_head': expected a projection"),
        (["embed_tokens"], False, "embed_tokens outside of them"),
        (["q_proj", "("], False, "a name or a regular expression, found"),
        ([r"layers\.0\..*"], False, "found none"),
    ],
    ids=str,
)
def test_what_is_no_target(targets: list[str] | str, vision: bool, stated: str) -> None:
    with pytest.raises(VLBridgeError, match=stated):
        select_weights(DENSE, targets, vision)


def test_the_router_and_the_gate_of_the_shared_expert_have_no_adapter() -> None:
    for config, name in ((EXPERTS, "mlp.gate"), (LINEAR, "shared_expert_gate"), (LINEAR, "conv1d")):
        with pytest.raises(VLBridgeError, match=f"expected only projections, found .*{name}"):
            select_weights(config, [name])


@pytest.mark.parametrize(
    ("settings", "stated"),
    [
        ({"rank": 0}, "LoRA rank: expected an integer of at least 1, found 0"),
        ({"rank": 4.0}, "LoRA rank: expected an integer of at least 1, found 4.0"),
        ({"alpha": 0.0}, "LoRA alpha: expected a positive number, found 0.0"),
        ({"alpha": float("inf")}, "LoRA alpha: expected a positive number, found inf"),
        ({"dropout": 1.0}, "LoRA dropout: expected 0 to below 1, found 1.0"),
        ({"dropout": -0.1}, "LoRA dropout: expected 0 to below 1, found -0.1"),
        ({"dropout": 0.1}, "LoRA dropout 0.1: expected 0 with adapters of experts"),
    ],
    ids=str,
)
def test_settings_that_are_rejected(settings: dict[str, float], stated: str) -> None:
    with pytest.raises(VLBridgeError, match=stated):
        lora_settings(EXPERTS, **{"rank": 8, "alpha": 16.0, **settings})
    assert lora_settings(EXPERTS, rank=8, alpha=16.0, dropout=0.1, targets=["q_proj"]).scaling == 2.0


def test_names_and_shapes_in_checkpoints() -> None:
    weight = f"{LAYERS}.3.mlp.experts.gate_up_proj"
    assert weight_of(adapter_tensor(weight, "A")) == weight
    assert adapter_shape((4, 10, 6), "A", 2) == (4, 2, 6)
    assert adapter_shape((10, 6), "B", 2) == (10, 2)
    # Layers that only some have are not stacked.
    table = adapter_table({weight: (4, 10, 6)}, [weight], 2)
    assert table.hf_shapes == table.megatron_shapes
    assert set(table.hf_shapes.values()) == {(4, 2, 6), (4, 10, 2)}


def test_the_note_of_a_run(tmp_path: Path) -> None:
    assert read_adapter_manifest(tmp_path) is None
    manifest = AdapterManifest(8, 16.0, ("lm_head.weight",), "base")
    write_adapter_manifest(tmp_path, manifest)
    assert read_adapter_manifest(tmp_path) == manifest
    text = (tmp_path / ADAPTER_MANIFEST).read_text()
    for damaged, key in (
        (text.replace("8", "0"), "rank"),
        (text.replace("16.0", "true"), "alpha"),
        (text.replace('["lm_head.weight"]', '"q"'), "weights"),
        (text.replace('"base": "base"', '"base": 1'), "base"),
    ):
        (tmp_path / ADAPTER_MANIFEST).write_text(damaged)
        with pytest.raises(VLBridgeError, match=f"{ADAPTER_MANIFEST}: {key}: expected"):
            read_adapter_manifest(tmp_path)
