"""Checkpoints in FP8 with scales: dequantised as a block-by-block oracle does, slice by slice, and said so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from megatron_vlbridge import cli, read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.hf.reader import INDEX, SafetensorsFolder
from megatron_vlbridge.checkpoint.import_plan import plan_import
from megatron_vlbridge.checkpoint.inspect import inspect
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region
from tests import reference
from tests.fp8_checkpoint import CONFIG, dequantise, quantise, quantise_folder
from tests.unit import test_convert, test_convert_moe
from tests.unit.test_convert import assert_same_bits, assert_side_files_are_the_same, tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DOWN = "model.language_model.layers.1.mlp.down_proj.weight"
KINDS = ["dense", "fused_in_out", "fused_out_in", "per_expert", "linear-experts"]


def make(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Sizes that no block divides, some larger than one block; gives what the tensors stand for."""
    if kind == "linear-experts":
        return make_linear(folder)
    module, model = test_convert, Qwen3VLForConditionalGeneration
    config = test_convert.tiny_config(False)
    if kind != "dense":
        module, model = test_convert_moe, Qwen3VLMoeForConditionalGeneration
        config = test_convert_moe.tiny_config(inner=72)
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 160
    config.text_config.intermediate_size = 300
    torch.manual_seed(0)
    built = model(config)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    built.to(torch.bfloat16).save_pretrained(folder, max_shard_size="400KB")
    if kind in ("fused_in_out", "per_expert"):
        found = tensors(folder)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        for name in [name for name in found if ".mlp.experts." in name]:
            found |= module.other_form(name, found.pop(name), kind)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")
    return quantise_folder(folder, torch.bfloat16 if kind == "fused_out_in" else torch.float32)


def make_linear(folder: Path) -> dict[str, torch.Tensor]:
    """Qwen3.5-MoE, whose decay and norm after linear attention stay in float32."""
    reference.write_checkpoint(folder, **reference.KINDS["linear-experts"])
    for path in folder.glob("*.safetensors"):
        found = {
            name: tensor if name.endswith((".A_log", ".linear_attn.norm.weight")) else tensor.bfloat16()
            for name, tensor in load_file(path).items()
        }
        save_file(found, path)
    return quantise_folder(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("fp8")
    return {kind: (folder / kind, make(folder / kind, kind)) for kind in KINDS}


@pytest.fixture
def source(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["dense"][0], tmp_path / "hf"))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_region_is_the_slice_of_the_dequantised_whole(tmp_path_factory, data):
    lead = data.draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*lead, data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300)))
    scale_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    numbers, scales = quantise(torch.randn(shape, generator=random), scale_dtype)
    folder = tmp_path_factory.mktemp("region")
    save_file({"x": numbers, "x_scale_inv": scales}, folder / "model.safetensors")
    offset = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    size = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    region = Region("x", offset, size)
    expected = dequantise(numbers, scales)[region.slices]
    reader = SafetensorsFolder(folder)
    assert torch.equal(reader.read(region), expected)
    turned = torch.empty(size[::-1]).permute(*range(len(size))[::-1])
    reader.read_into(region, turned)
    assert torch.equal(turned, expected.float())


def test_every_number_of_eight_bits_is_dequantised_as_torch_does(tmp_path):
    """All of them, NaN and both zeros included; larger than what is dequantised at once."""
    numbers = torch.arange(256, dtype=torch.uint8).repeat(2700).view(torch.float8_e4m3fn).view(900, 768)
    scales = torch.rand(8, 6) + 0.1
    save_file({"x": numbers, "x_scale_inv": scales}, tmp_path / "model.safetensors")
    found = SafetensorsFolder(tmp_path).read(Region.whole("x", (900, 768)))
    assert torch.equal(found.view(torch.int16), dequantise(numbers, scales).view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
def test_the_import_is_that_of_the_dequantised_folder(kind, made, tmp_path):
    source, expected = made[kind]
    plain = Path(shutil.copytree(source, tmp_path / "plain", ignore=shutil.ignore_patterns("*.safetensors*")))
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, plain / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ours, theirs = (import_checkpoint(folder, tmp_path / f"from-{folder.name}") for folder in (source, plain))
    for path in (theirs / "release").iterdir():
        assert (ours / "release" / path.name).read_bytes() == path.read_bytes(), path.name
    back = export_checkpoint(ours, tmp_path / "back")
    assert_same_bits(tensors(back), expected)
    assert_side_files_are_the_same(back, plain)
    shards = {path.name for path in source.glob("*.safetensors")}
    assert {path.name for path in back.glob("*.safetensors")} == shards
    if (back / INDEX).exists():
        assert json.loads((back / INDEX).read_text())["weight_map"].keys() == expected.keys()
    assert verify(source, ours).equal
    assert verify(back, source).equal


def test_transformers_loads_the_export(made, tmp_path):
    source, expected = made["dense"]
    back = export_checkpoint(import_checkpoint(source, tmp_path / "megatron"), tmp_path / "back")
    found = Qwen3VLForConditionalGeneration.from_pretrained(back, dtype="auto").state_dict()
    assert_same_bits(found, expected)


def test_weights_alone_are_exported_like_a_quantised_folder(made, tmp_path):
    source, expected = made["dense"]
    plain = Path(shutil.copytree(source, tmp_path / "plain", ignore=shutil.ignore_patterns("*.safetensors*")))
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, plain / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    run = tmp_path / "run"
    run.mkdir()
    import_checkpoint(plain, run / "imported")
    shutil.rmtree(run / "imported" / "hf")
    back = export_checkpoint(run / "imported", tmp_path / "back", like=source)
    assert_same_bits(tensors(back), expected)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert not (back / INDEX).exists() or "scale_inv" not in (back / INDEX).read_text()
    assert SafetensorsFolder(back).as_on_the_hub


def test_another_dtype_is_that_of_the_bfloat16_numbers(made, tmp_path):
    source, expected = made["dense"]
    import_checkpoint(source, tmp_path / "megatron", dtype="float32")
    back = export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(back), {name: tensor.float() for name, tensor in expected.items()})


def test_plan_and_inspection_say_it(made, tmp_path, capsys):
    source, expected = made["dense"]
    assert cli.main(["import", str(source), str(tmp_path / "megatron"), "--dry-run"]) == 0
    assert "FP8 weights, dequantised to bfloat16 by their scales: 21 tensors: " in capsys.readouterr().out
    found = inspect(source)
    assert found.dtypes == {"bfloat16": len(expected)}
    assert found.notes[0].startswith("FP8 weights")
    assert found.table.keys() == expected.keys()
    import_checkpoint(source, tmp_path / "megatron")
    assert (
        cli.main(["export", str(tmp_path / "megatron"), str(tmp_path / "x"), "--like", str(source), "--dry-run"]) == 0
    )
    assert "weights are not quantised again" in capsys.readouterr().out


def test_a_slice_reads_only_the_scales_of_its_blocks(tmp_path):
    numbers, scales = quantise(torch.randn(300, 300))
    expected = dequantise(numbers, scales)
    scales[2, 1] = float("nan")
    save_file({"x": numbers, "x_scale_inv": scales}, tmp_path / "model.safetensors")
    reader = SafetensorsFolder(tmp_path)
    for offset, size in (((0, 0), (256, 300)), ((0, 256), (300, 44)), ((256, 0), (44, 128))):
        region = Region("x", offset, size)
        assert torch.equal(reader.read(region), expected[region.slices])
    for offset in ((256, 255), (299, 128)):
        with pytest.raises(VLBridgeError, match=r"x_scale_inv: expected positive finite scales, found nan at \[2, 1\]"):
            reader.read(Region("x", offset, (1, 1)))


def test_a_file_of_scales_alone_is_a_source_too(source, tmp_path):
    index = json.loads((source / INDEX).read_text())
    scales = {}
    for path in source.glob("*.safetensors"):
        found = load_file(path)
        names = [name for name in found if name.endswith("_scale_inv")]
        scales |= {name: found.pop(name) for name in names}
        save_file(found, path)
    save_file(scales, source / "scales.safetensors")
    index["weight_map"] |= dict.fromkeys(scales, "scales.safetensors")
    (source / INDEX).write_text(json.dumps(index))
    assert source / "scales.safetensors" in plan_import(source, tmp_path / "megatron").source_files
    back = export_checkpoint(import_checkpoint(source, tmp_path / "megatron"), tmp_path / "back")
    assert "scales.safetensors" not in {path.name for path in back.iterdir()}
    assert verify(source, back).equal


def edit(folder: Path, name: str, change) -> None:
    """Change one tensor of a folder, or take it away where `change` gives None."""
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"][name]
    found = load_file(path)
    new = change(found.pop(name))
    if new is None:
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))
    else:
        found[name] = new.contiguous()
    save_file(found, path)


def put(value: float):
    def change(scales: torch.Tensor) -> torch.Tensor:
        scales[-1, -1] = value
        return scales

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (DOWN + "_scale_inv", put(float("nan")), r"found nan at \[1, 2\]"),
        (DOWN + "_scale_inv", put(float("inf")), r"found inf at \[1, 2\]"),
        (DOWN + "_scale_inv", put(0.0), r"found 0\.0 at \[1, 2\]"),
        (DOWN + "_scale_inv", put(-1.0), r"found -1\.0 at \[1, 2\]"),
        (DOWN + "_scale_inv", put(3e38), r"expected scales whose products fit bfloat16 .* found larger ones"),
        (DOWN + "_scale_inv", lambda scales: scales[:, :0], r"expected \[2, 3\] in float32 .* found \[2, 0\]"),
        (DOWN + "_scale_inv", lambda scales: scales.T, r"expected \[2, 3\] in float32 .* found \[3, 2\]"),
        (DOWN + "_scale_inv", lambda scales: scales[0, 0], r"expected \[2, 3\] in float32 .* found \[\]"),
        (DOWN + "_scale_inv", lambda scales: scales.half(), "found .* float16"),
        (DOWN + "_scale_inv", lambda scales: None, "expected .*_scale_inv beside .* found none"),
        (DOWN, lambda numbers: None, "expected the scales of .* found no such weight"),
        (DOWN, lambda numbers: numbers.float(), "expected the scales of .* float32"),
        (DOWN, lambda numbers: numbers.to(torch.float8_e5m2), "expected the scales of .* float8_e5m2"),
        (DOWN, lambda numbers: numbers[0], "expected a matrix"),
    ],
)
def test_scales_that_are_none_are_refused_by_name(name, change, reason, source, tmp_path):
    edit(source, name, change)
    for read in (lambda: import_checkpoint(source, tmp_path / "megatron"), lambda: verify(source, source)):
        with pytest.raises(VLBridgeError, match=reason) as caught:
            read()
        assert str(source) in str(caught.value)
        assert DOWN in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_eight_bits_without_scales_are_refused(tmp_path):
    source = test_convert.make(tmp_path / "hf")
    norm = test_convert.NORM.format(0)
    test_convert.rewrite(source, lambda found: found.update({norm: found[norm].to(torch.float8_e4m3fn)}))
    with pytest.raises(VLBridgeError, match=r"input_layernorm\.weight: expected .*_scale_inv beside"):
        import_checkpoint(source, tmp_path / "megatron")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_config_that_says_otherwise_is_refused(source, tmp_path):
    edit_config(source, quantization_config=None)
    with pytest.raises(VLBridgeError, match=r"expected none in FP8, as quantization_config .* found model\.language"):
        import_checkpoint(source, tmp_path / "megatron")
    plain = test_convert.make(tmp_path / "plain")
    edit_config(plain, quantization_config=CONFIG)
    with pytest.raises(VLBridgeError, match=r"expected FP8 tensors, as quantization_config .* found no such tensor"):
        import_checkpoint(plain, tmp_path / "megatron")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"quant_method": "awq"}, "quant_method"),
        ({"quant_method": "compressed-tensors"}, "quant_method"),
        ({"quant_method": None}, "quant_method"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"weight_block_size": [64, 128]}, "weight_block_size"),
        ({"weight_block_size": 128}, "weight_block_size"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"expert_dtype": "fp4"}, "expert_dtype"),
    ],
)
def test_other_kinds_of_quantisation_are_refused(changes, key, source):
    assert read_config(source).fp8
    edit_config(source, quantization_config=CONFIG | changes)
    with pytest.raises(VLBridgeError, match=rf"quantization_config\.{key}: .*use the unquantised one"):
        read_config(source)
