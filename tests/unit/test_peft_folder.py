"""PEFT folders are read and written in the form of peft, and anything else is rejected by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.peft.adapter import base_shapes, read_adapter
from megatron_vlbridge.checkpoint.peft.config import AdapterConfig, read_adapter_config
from megatron_vlbridge.checkpoint.peft.writer import write_adapter
from megatron_vlbridge.errors import VLBridgeError

Q, FUSED, DOWN = "layers.0.self_attn.q_proj", "layers.0.mlp.experts.base_layer", "layers.0.mlp.experts"
BASE = {
    f"{Q}.weight": (6, 4),
    "layers.0.mlp.experts.gate_up_proj": (2, 10, 4),
    "layers.0.mlp.experts.down_proj": (2, 4, 5),
}
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "bias": "none", "use_dora": False, "peft_version": "0.21.0"}


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {Q: ((3, 4), (6, 3)), FUSED: ((6, 4), (10, 6)), DOWN: ((6, 5), (4, 6))}
    return {
        f"base_model.model.{module}.lora_{half}.weight": torch.randn(shape)
        for module, pair in shapes.items()
        for half, shape in zip("AB", pair, strict=True)
    }


def _write(folder: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_pairs_are_those_of_the_file_with_the_expert_fastest_in_b(tmp_path: Path) -> None:
    tensors = _tensors()
    pairs = read_adapter(_write(tmp_path, tensors), BASE)
    assert pairs.keys() == BASE.keys()
    a, b = pairs[f"{Q}.weight"].read()
    assert torch.equal(a, tensors[f"base_model.model.{Q}.lora_A.weight"])
    assert torch.equal(b, tensors[f"base_model.model.{Q}.lora_B.weight"])
    for module, weight in ((FUSED, "gate_up_proj"), (DOWN, "down_proj")):
        whole_a, whole_b = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        for expert in range(2):
            a, b = pairs[f"layers.0.mlp.experts.{weight}"].read(expert)
            assert torch.equal(a, torch.stack([whole_a[expert * 3 + r] for r in range(3)]))
            assert torch.equal(b, torch.stack([whole_b[:, r * 2 + expert] for r in range(3)], 1))


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, 5 / 3),
        ({"init_lora_weights": True}, 5 / 3),
        ({"init_lora_weights": "gaussian"}, 5 / 3),
        ({"use_rslora": True}, 5 / 3**0.5),
        ({"alpha_pattern": {"q_proj": 7, "self_attn.q_proj": 8}}, 7 / 3),
    ],
)
def test_scaling(tmp_path: Path, changes: dict[str, object], scaling: float) -> None:
    assert read_adapter(_write(tmp_path, _tensors(), **changes), BASE)[f"{Q}.weight"].scaling == scaling


def test_a_pattern_gives_a_module_another_rank_and_scaling(tmp_path: Path) -> None:
    tensors = _tensors()
    for half, shape in {"A": (2, 4), "B": (6, 2)}.items():
        tensors[f"base_model.model.{Q}.lora_{half}.weight"] = torch.ones(shape)
    pairs = read_adapter(_write(tmp_path, tensors, rank_pattern={"q_proj": 2, "proj": 9}), BASE)
    scalings = {weight: pair.scaling for weight, pair in pairs.items()}
    assert scalings == dict.fromkeys(BASE, 5 / 3) | {f"{Q}.weight": 5 / 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"something_new": 1}, "something_new"),
        ({"r": 0}, "r: expected a positive integer"),
        ({"rank_pattern": {"q_proj": 1.5}}, "q_proj: expected a positive integer"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern: expected regular expressions"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number"),
        ({"use_rslora": 1}, "use_rslora: expected true or false"),
        ({"r": 4}, "rank 4"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: expected an adapter of the unchanged base"),
        ({"init_lora_weights": []}, "init_lora_weights: expected an adapter of the unchanged base"),
        ({"target_parameters": "q_proj"}, "target_parameters: expected a list of names"),
    ],
)
def test_an_invalid_config_is_rejected_by_key(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(VLBridgeError, match=words.replace("(", r"\(")):
        read_adapter(_write(tmp_path, _tensors(), **changes), BASE)


@pytest.mark.parametrize(
    "key", ["base_model.model.x.lora_A.weight", f"{Q}.lora_A.weight", f"base_model.model.{Q}.bias"]
)
def test_a_key_that_fits_nothing_is_rejected(tmp_path: Path, key: str) -> None:
    with pytest.raises(VLBridgeError, match="of a module of the base"):
        read_adapter(_write(tmp_path, _tensors() | {key: torch.ones(3, 4)}), BASE)


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half_and_another_base_are_rejected(tmp_path: Path, half: str) -> None:
    tensors, key = _tensors(), f"base_model.model.{Q}.lora_{half}.weight"
    tensors[key] = torch.ones(7, 7)
    with pytest.raises(VLBridgeError, match=f"lora_{half}: expected"):
        read_adapter(_write(tmp_path, tensors), BASE)
    del tensors[key]
    with pytest.raises(VLBridgeError, match="expected lora_A and lora_B"):
        read_adapter(_write(tmp_path, tensors), BASE)


def test_integers_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(VLBridgeError, match=r"in floating point, .* int32"):
        read_adapter(_write(tmp_path, {name: x.int() for name, x in _tensors().items()}), BASE)


def test_a_file_that_is_cut_while_it_is_read_is_rejected(tmp_path: Path) -> None:
    pairs = read_adapter(_write(tmp_path, _tensors()), BASE)
    with (tmp_path / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(VLBridgeError, match=r"adapter_model\.safetensors: expected to read"):
        pairs[f"{Q}.weight"].read()


def test_two_adapters_of_one_parameter_are_rejected(tmp_path: Path) -> None:
    tensors = _tensors()
    for half in "AB":
        tensors[f"base_model.model.{DOWN}.lora_{half}.weight"] = tensors[f"base_model.model.{FUSED}.lora_{half}.weight"]
    with pytest.raises(VLBridgeError, match="gate_up_proj a second time"):
        read_adapter(_write(tmp_path, {name: x.clone() for name, x in tensors.items()}), BASE)


def test_an_empty_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(VLBridgeError, match="found none"):
        read_adapter(_write(tmp_path, {}), BASE)


Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _read_pairs(folder: Path) -> Pairs:
    found: Pairs = {}
    for weight, pair in read_adapter(folder, BASE).items():
        if pair.experts is None:
            found[weight] = pair.read()
        else:
            a, b = zip(*map(pair.read, range(pair.experts)), strict=True)
            found[weight] = torch.stack(a), torch.stack(b)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"x": 2}, "alpha_pattern": {"q_proj": 7}}]
)
def test_a_written_folder_is_that_which_was_read(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, object]
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tensors = _tensors()
    tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items() if "experts" in key}
    config = read_adapter_config(_write(source, tensors, **changes))
    write_adapter(target, "base", config, _read_pairs(source))
    written = load_file(target / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype
        assert torch.equal(written[key], tensor), key
    assert read_adapter_config(target) == config
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
    noted = json.loads((target / "adapter_config.json").read_text())
    assert (noted["target_modules"], noted["base_model_name_or_path"]) == ([Q], "base")
    assert noted["target_parameters"] == ["layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"]


EXPERTS = "layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({}, "found none"),
        ({f"{Q}.weight": ((2, 4), (6, 2))}, "rank 3"),
        ({f"{Q}.weight": ((3, 4), (6, 2))}, "rank 3"),
        ({f"{Q}.weight": ((2, 4), (6, 3))}, "rank 3"),
        ({f"{Q}.weight": ((2, 3, 4), (2, 6, 3))}, "expected A .r, in."),
        ({f"{Q}.bias": ((3, 4), (6, 3))}, "expected a .weight"),
        ({f"{EXPERTS}.down_proj": ((3, 4), (6, 3))}, "expected A .E, r, in."),
        ({f"{EXPERTS}.down_proj": ((2, 3, 5), (1, 4, 3))}, "expected A .E, r, in."),
    ],
)
def test_a_pair_that_peft_would_not_load_is_not_written(
    tmp_path: Path, pairs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], words: str
) -> None:
    given = {weight: (torch.ones(a), torch.ones(b)) for weight, (a, b) in pairs.items()}
    with pytest.raises(VLBridgeError, match=words):
        write_adapter(tmp_path / "target", "base", AdapterConfig(3, 5.0), given)
    assert not list(tmp_path.iterdir())


def test_integers_and_a_taken_folder_are_rejected(tmp_path: Path) -> None:
    a, b = torch.ones(3, 4), torch.ones(6, 3)
    for given in ((a.int(), b), (a, b.int())):
        with pytest.raises(VLBridgeError, match="floating dtype"):
            write_adapter(tmp_path / "target", "base", AdapterConfig(3, 5.0), {f"{Q}.weight": given})
    (tmp_path / "kept").touch()
    with pytest.raises(VLBridgeError, match="something there"):
        write_adapter(tmp_path, "base", AdapterConfig(3, 5.0), {f"{Q}.weight": (a, b)})
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_parameters_that_are_views_of_another_dtype_each_are_written_aligned(tmp_path: Path) -> None:
    pairs = {
        "x.weight": (torch.arange(3).view(1, 3).bfloat16(), torch.arange(10.0).view(1, 10).t()[::2]),
        "y.weight": (torch.nn.Parameter(torch.arange(8.0).view(1, 8)[:, ::2]), torch.nn.Parameter(torch.ones(3, 1))),
    }
    write_adapter(tmp_path / "target", "base", AdapterConfig(1, 5.0), pairs)
    found = read_adapter(tmp_path / "target", {"x.weight": (5, 3), "y.weight": (3, 4)})
    for weight, pair in found.items():
        for stored, read, given in zip((pair.a, pair.b), pair.read(), pairs[weight], strict=True):
            assert torch.equal(read, given)
            assert stored.start % given.dtype.itemsize == 0


@pytest.mark.parametrize("inner", [2, 4, 5])
@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj"])
def test_one_of_both_parameters_of_experts_has_the_name_of_the_module(tmp_path: Path, weight: str, inner: int) -> None:
    """As `peft` wraps a parameter alone. Its shape tells which it is, also where some of the sizes are equal."""
    base = {f"{EXPERTS}.gate_up_proj": (2, 2 * inner, 4), f"{EXPERTS}.down_proj": (2, 4, inner)}
    name = f"{EXPERTS}.{weight}"
    _, rows, columns = base[name]
    a, b = torch.randn(2, 3, columns), torch.randn(2, rows, 3)
    write_adapter(tmp_path / "alone", "base", AdapterConfig(3, 5.0), {name: (a, b)})
    keys = load_file(tmp_path / "alone" / "adapter_model.safetensors").keys()
    assert keys == {f"base_model.model.{EXPERTS}.lora_{half}.weight" for half in "AB"}
    (found,) = read_adapter(tmp_path / "alone", base).items()
    assert found[0] == name
    for expert in range(2):
        assert all(map(torch.equal, found[1].read(expert), (a[expert], b[expert])))


@pytest.mark.parametrize("experts", [True, False])
def test_targets_that_are_absent_are_null(tmp_path: Path, experts: bool) -> None:
    weight = f"{EXPERTS}.down_proj" if experts else f"{Q}.weight"
    pair = (torch.ones(2, 3, 5), torch.ones(2, 4, 3)) if experts else (torch.ones(3, 4), torch.ones(6, 3))
    write_adapter(tmp_path / "target", "base", AdapterConfig(3, 5.0), {weight: pair})
    noted = json.loads((tmp_path / "target" / "adapter_config.json").read_text())
    expected = (None, [weight]) if experts else ([Q], None)
    assert (noted["target_modules"], noted["target_parameters"]) == expected


def test_linear_layers_and_experts_can_have_an_adapter() -> None:
    config = read_config(Path(__file__).parents[1] / "data" / "configs" / "Qwen3.5-35B-A3B.json")
    shapes = base_shapes(config)
    ends = {re.sub(r"\d+", "N", name.removesuffix(".weight")).rpartition(".")[2] for name in shapes}
    assert ends == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "gate", "fc"),
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "shared_expert_gate", "lm_head"),
        *("qkv", "proj", "linear_fcN"),
    }
    experts = "model.language_model.layers.0.mlp.experts"
    assert shapes[f"{experts}.gate_up_proj"] == (256, 1024, 2048)
    assert shapes[f"{experts}.down_proj"] == (256, 2048, 512)
    assert "model.visual.patch_embed.proj.weight" not in shapes


@pytest.mark.parametrize(
    ("target", "adapted"),
    [(f"{Q}.weight", True), ("q_proj.weight", True), ("proj.weight", False), ("q_proj", False), ("", False)],
)
def test_a_parameter_is_named_by_the_end_of_its_path(tmp_path: Path, target: str, adapted: bool) -> None:
    pairs = read_adapter(_write(tmp_path, _tensors(), target_parameters=[target]), BASE)
    assert pairs[f"{Q}.weight"].parameter == adapted
    assert pairs[f"{EXPERTS}.down_proj"].parameter
