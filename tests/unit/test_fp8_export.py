"""Exports in FP8: what published checkpoints hold, equal to a reference, and read back to the last bit."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge import cli, read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.export_plan import ExportChoices, plan_export
from megatron_vlbridge.checkpoint.hf import writer as hf_writer
from megatron_vlbridge.checkpoint.hf.quantise import quantised_output, weight_region
from megatron_vlbridge.checkpoint.hf.reader import INDEX, SafetensorsFolder
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS, verify_checksums
from megatron_vlbridge.checkpoint.stream.engine import Options
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.weights import TensorSpec
from tests import mtp_reference, reference
from tests.fp8_checkpoint import CONFIG, dequantise, quantise_in_fp32
from tests.unit.test_convert import assert_same_bits, tensors
from tests.unit.test_quantise import unused
from tests.unit.test_resume import stop_after

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# More than one block in both directions, and no multiple of one.
SIZES = {"hidden_size": 160, "intermediate_size": 300, "moe_intermediate_size": 136}
KINDS = ["dense", "experts", "linear-experts", "prediction"]
Tensors = dict[str, torch.Tensor]


def make(folder: Path, kind: str) -> Path:
    """In bfloat16, but for what Qwen3.5 keeps in float32."""
    options: dict[str, object] = {"text_fields": SIZES, "vision_fields": {"out_hidden_size": 160}}
    if kind == "prediction":
        mtp_reference.write_mtp_checkpoint(folder, experts={}, **options)
    else:
        reference.write_checkpoint(folder, **options, **reference.KINDS[kind])
    for path in folder.glob("*.safetensors"):
        kept = (".A_log", ".linear_attn.norm.weight")
        found = {name: x if name.endswith(kept) else x.bfloat16() for name, x in load_file(path).items()}
        save_file(found, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    return {kind: import_checkpoint(make(folder / kind, kind), folder / f"megatron-{kind}") for kind in KINDS}


def reference_of(plain: Tensors) -> Tensors:
    """Each published linear of an export per expert, quantised block by block."""
    linear = re.compile(
        r"(model\.language_model|mtp)\.layers\..*(_proj|in_proj_qkv|in_proj_z)\.weight"  # not in_proj_a, in_proj_b
    )
    result = {}
    for name, x in plain.items():
        result[name] = x
        if linear.fullmatch(name):
            result[name], result[f"{name}_scale_inv"] = quantise_in_fp32(x)
    return result


def same_bytes(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        and torch.equal(found[name].view(torch.uint8), x.view(torch.uint8))
        for name, x in expected.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_the_reference_and_is_read_back(kind: str, imported: dict[str, Path], tmp_path: Path) -> None:
    single = None if kind == "dense" else "per_expert"
    plain = tensors(export_checkpoint(imported[kind], tmp_path / "plain", experts=single))
    folder = export_checkpoint(imported[kind], tmp_path / "fp8", fp8=True, max_shard_size=300_000)
    expected = reference_of(plain)
    assert 14 < len(expected) - len(plain) < len(plain)
    assert same_bytes(tensors(folder), expected)
    index = json.loads((folder / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    assert len(set(index["weight_map"].values())) > 2

    values = {
        name: dequantise(x, expected[f"{name}_scale_inv"]) if x.dtype == torch.float8_e4m3fn else x
        for name, x in expected.items()
        if not name.endswith("_scale_inv")
    }
    back = import_checkpoint(folder, tmp_path / "back")
    assert_same_bits(tensors(export_checkpoint(back, tmp_path / "again")), values)
    assert verify(folder, back).equal
    assert verify_checksums(folder).equal


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_is_that_of_published_folders(kind: str, imported: dict[str, Path], tmp_path: Path) -> None:
    folder = export_checkpoint(imported[kind], tmp_path / "fp8", fp8=True)
    config = json.loads((folder / "config.json").read_bytes())
    found = config.pop("quantization_config")
    assert found.keys() == CONFIG.keys()
    assert {key for key in found if found[key] != CONFIG[key]} == {"modules_to_not_convert"}
    assert config == json.loads((imported[kind] / "hf" / "config.json").read_bytes())
    assert read_config(folder).fp8


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_converts_the_linears_that_are_quantised(
    kind: str, imported: dict[str, Path], tmp_path: Path
) -> None:
    """By its own reading of the list: those, the experts, and no other."""
    import transformers
    from transformers.quantizers.quantizers_utils import should_convert_module

    folder = export_checkpoint(imported[kind], tmp_path / "fp8", fp8=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    listed = config.quantization_config["modules_to_not_convert"]
    del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    written = tensors(folder)
    quantised = {name.removesuffix(".weight_scale_inv") for name in written if name.endswith(".weight_scale_inv")}
    experts = {name for name in quantised if ".experts." in name}
    of_model = {name for name in quantised - experts if not name.startswith("mtp.")}
    assert len(of_model) > 10
    assert {name for name in linears if should_convert_module(name, listed)} == of_model
    assert all(should_convert_module(name, listed) for name in experts)
    assert bool(experts) == (kind != "dense")
    others = {name.removesuffix(".weight") for name in written if name.endswith(".weight")} - quantised | {"lm_head"}
    of_engines = set(listed) - others
    assert others <= set(listed)
    assert len(listed) == len(set(listed))
    assert {"visual.blocks.0.attn.qkv_proj", "visual.merger.linear_fc1", "visual.pos_embed"} <= of_engines
    assert all(name.startswith("visual.") or name.endswith(("qkv_proj", "in_proj_ba")) for name in of_engines)
    tower = {name.removeprefix("model.") for name in others if name.startswith("model.visual.")}
    assert {name.replace(".attn.qkv", ".attn.qkv_proj") for name in tower} <= of_engines


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of parts for a tiny checkpoint."""
    monkeypatch.setattr(hf_writer, "PART_BYTES", 60_000)


@pytest.mark.usefixtures("small_parts")
def test_a_resumed_export_gives_the_same_bytes(imported: dict[str, Path], tmp_path: Path) -> None:
    straight = export_checkpoint(imported["experts"], tmp_path / "straight", fp8=True, options=Options(workers=1))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(imported["experts"], tmp_path / "fp8", fp8=True, options=stop_after(20))
    with pytest.raises(VLBridgeError, match="with the same options, found --fp8 nothing where it was True"):
        export_checkpoint(imported["experts"], tmp_path / "fp8", resume=True)
    folder = export_checkpoint(imported["experts"], tmp_path / "fp8", fp8=True, resume=True)
    assert files_of(folder) == files_of(straight)
    with pytest.raises(VLBridgeError, match="found that of another: --fp8 nothing where it was True"):
        export_checkpoint(imported["experts"], folder, resume=True)


def test_what_is_read_for_a_part_is_bounded() -> None:
    """Of scales, of which one element is read from 128 x 128, as of values."""
    plain = {
        "model.language_model.layers.0.mlp.up_proj.weight": TensorSpec((25_600, 25_600), torch.bfloat16),
        "model.language_model.layers.0.mlp.down_proj.weight": TensorSpec((200, 300_000), torch.float32),
        "lm_head.weight": TensorSpec((100_000, 5_000), torch.bfloat16),
    }
    written, fill, reads = quantised_output(plain, unused, ())
    writer = hf_writer.SafetensorsWriter(written, dict.fromkeys(written, "model.safetensors"), fill, reads)
    seen: dict[str, int] = dict.fromkeys(written, 0)
    for part in writer.regions:
        read = [weight_region(region, plain) for region in part]
        sizes = [region.volume * plain[region.name].dtype.itemsize for region in read]
        assert sum(sizes) <= hf_writer.PART_BYTES
        # A row of blocks, if that is larger.
        assert max(sizes, default=0) <= max(64 * 2**20, 128 * 300_000 * 4)
        for region in part:
            rows = 1 if region.name not in plain else 128
            assert region.offset[0] % rows == 0 or written[region.name].dtype != torch.float8_e4m3fn
            assert region.shape[1] == written[region.name].shape[1]
            seen[region.name] += region.volume
    assert seen == {name: math.prod(spec.shape) for name, spec in written.items()}


def test_a_folder_in_fp8_is_a_template(imported: dict[str, Path], tmp_path: Path) -> None:
    """Its own quantization is not kept, with or without a new one, and a tied head that it stores is stored."""
    first = export_checkpoint(imported["dense"], tmp_path / "first", fp8=True)
    config = json.loads((first / "config.json").read_bytes())
    config["quantization_config"]["modules_to_not_convert"] = ["other"]
    (first / "config.json").write_text(json.dumps(config))
    again = export_checkpoint(imported["dense"], tmp_path / "again", like=first, fp8=True)
    assert same_bytes(tensors(again), tensors(first))
    listed = json.loads((again / "config.json").read_bytes())["quantization_config"]["modules_to_not_convert"]
    assert "other" not in listed
    plain = export_checkpoint(imported["dense"], tmp_path / "plain", like=first)
    assert not read_config(plain).fp8


def test_tensors_that_are_not_part_of_the_model_stay_as_they_are(imported: dict[str, Path], tmp_path: Path) -> None:
    """Also such as a quantised linear would be called, which is listed then."""
    like = export_checkpoint(imported["dense"], tmp_path / "like")
    extras = {
        "mtp.layers.0.self_attn.q_proj.weight": torch.randn(8, 8).bfloat16(),
        "steps": torch.arange(6).view(2, 3),
    }
    save_file(tensors(like) | extras, like / "model.safetensors")
    for path in like.glob("model-*"):
        path.unlink()
    (like / INDEX).unlink()
    folder = export_checkpoint(imported["dense"], tmp_path / "fp8", like=like, fp8=True)
    found = tensors(folder)
    assert all(torch.equal(found[name], x) for name, x in extras.items())
    listed = json.loads((folder / "config.json").read_bytes())["quantization_config"]["modules_to_not_convert"]
    assert "mtp.layers.0.self_attn.q_proj" in listed


def test_a_tied_model_has_its_head_listed_and_no_tensor(tmp_path: Path) -> None:
    source = reference.write_checkpoint(tmp_path / "hf", tied=True)
    folder = export_checkpoint(import_checkpoint(source, tmp_path / "megatron"), tmp_path / "fp8", fp8=True)
    assert "lm_head.weight" not in tensors(folder)
    config = json.loads((folder / "config.json").read_bytes())
    assert "lm_head" in config["quantization_config"]["modules_to_not_convert"]
    assert {x.dtype for x in tensors(folder).values()} == {torch.float32, torch.float8_e4m3fn}
    assert verify(folder, import_checkpoint(folder, tmp_path / "back")).equal


def test_a_value_without_a_form_in_fp8_is_refused_by_name(tmp_path: Path) -> None:
    source = reference.write_checkpoint(tmp_path / "hf")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    path = source / json.loads((source / INDEX).read_bytes())["weight_map"][name]
    found = load_file(path)
    found[name][70, 3] = float("nan")
    save_file(found, path, metadata={"format": "pt"})
    megatron = import_checkpoint(source, tmp_path / "megatron")
    with pytest.raises(VLBridgeError, match=rf"{name}: expected finite values .* found nan. Export without FP8"):
        export_checkpoint(megatron, tmp_path / "fp8", fp8=True)
    assert not (tmp_path / "fp8").exists()
    export_checkpoint(megatron, tmp_path / "plain")


def test_options_that_contradict_fp8_are_refused(imported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(VLBridgeError, match=r"expected float32 or bfloat16 for an export in FP8, found .*float16"):
        plan_export(imported["dense"], tmp_path / "fp8", choices=ExportChoices(dtype="float16", fp8=True))
    for form in ("fused_in_out", "fused_out_in"):
        with pytest.raises(UsageError, match=f"experts: expected per_expert with FP8, found '{form}'"):
            plan_export(imported["experts"], tmp_path / "fp8", choices=ExportChoices(experts=form, fp8=True))
    plans = {
        form: plan_export(imported["experts"], tmp_path / "fp8", choices=ExportChoices(experts=form, fp8=True))
        for form in (None, "hub", "per_expert")
    }
    assert plans[None].tensors == plans["hub"].tensors == plans["per_expert"].tensors


def test_the_command_says_it(imported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", str(imported["experts"]), str(tmp_path / "fp8"), "--fp8"]
    assert cli.main([*line, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "linear layers are written in FP8, with a float32 scale for each block of 128 x 128" in shown
    assert "experts are written one by one" in shown
    assert "experts are written as" not in shown
    assert cli.main(line) == 0
    assert read_config(tmp_path / "fp8").fp8
    assert CHECKSUMS in {path.name for path in (tmp_path / "fp8").iterdir()}
    assert SafetensorsFolder(tmp_path / "fp8").scaled
    assert cli.main([*line, "--adapter"]) == 2
    assert "--fp8: expected none with --adapter" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "fp8")
    assert cli.main([*line, "--experts", "fused_in_out"]) == 2
