"""`verify` finds every changed bit and nothing else; `inspect` counts what is there."""

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blake3 import blake3
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from safetensors.torch import load_file, save_file

from megatron_vlbridge.checkpoint.comparison import Difference
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.inspect import inspect
from megatron_vlbridge.checkpoint.pipeline_split import split_arguments, split_layers
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS, verify_checksums
from megatron_vlbridge.checkpoint.stream.digest import ALGORITHMS
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.families import ExpertForm
from tests import reference
from tests.unit import test_convert_moe
from tests.unit.test_convert import bits_without_nan, training_run

QKV = "language_model.decoder.layers.self_attention.linear_qkv.weight"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """`hf`, and `megatron` made from it."""
    folder = tmp_path_factory.mktemp("model")
    import_checkpoint(reference.write_checkpoint(folder / "hf", layers=2), folder / "megatron")
    return folder


@pytest.fixture
def hf(model, tmp_path) -> Path:
    return Path(shutil.copytree(model / "hf", tmp_path / "changed"))


def change(folder: Path, name: str, edit) -> None:
    """Edit one tensor of a Hugging Face folder in place."""
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(folder / file)
    tensors[name] = edit(tensors[name].clone()).contiguous()
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize(("a", "b"), [("hf", "megatron"), ("megatron", "hf"), ("hf", "hf"), ("megatron", "megatron")])
def test_the_same_weights_are_equal_in_any_two_forms(a, b, model):
    report = verify(model / a, model / b)
    assert report.equal
    named = "hf" if (a, b) == ("hf", "hf") else "megatron"
    assert report.compared == len(inspect(model / named).table)
    assert report.unit == {"hf": "Hugging Face tensors", "megatron": "Megatron tensors"}[named]
    assert report.nbytes == sum(spec.nbytes for spec in inspect(model / "hf").table.values())


def test_other_shards_and_a_training_run_are_equal_too(model, tmp_path):
    export_checkpoint(model / "megatron", tmp_path / "one", max_shard_size=10**9)
    assert verify(tmp_path / "one", model / "hf").equal


def test_padding_and_layers_one_by_one_are_equal_too(tmp_path):
    from tests.unit import test_convert

    hf = test_convert.make(tmp_path / "hf")
    run = training_run(tmp_path / "run", hf, padding=4, unstacked=True)
    assert verify(run, hf).equal
    assert verify(hf, run / "iter_0000007").equal
    assert verify(run, run).equal


def flip_a_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int32)[17, 3] ^= 1
    return tensor


def test_a_single_bit_is_found_and_named(model, hf):
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    change(hf, name, flip_a_bit)
    # Row 17 is in the first group's second head, so it keeps its place among the grouped rows.
    expected = {
        "hf": (name, "1 of 4096 values, first at [17, 3]: "),
        "megatron": (QKV, "1 of 16384 values, first at [1, 17, 3]: "),
    }
    for other, (named, text) in expected.items():
        report = verify(model / other, hf)
        assert not report.equal
        (difference,) = report.differences
        assert difference.name == named
        assert difference.text.startswith(text)


@pytest.mark.parametrize("other", ExpertForm)
@pytest.mark.parametrize("form", ExpertForm)
def test_forms_of_experts_are_compared_in_the_names_of_the_first(form, other, tmp_path):
    """Against a comparison by torch, of the same model whose folder holds its experts in another form."""
    left, right = (test_convert_moe.make(tmp_path / name, str(form)) for name, form in (("a", form), ("b", other)))
    report = verify(left, right)
    assert report.equal
    assert report.compared == len(inspect(left).table)
    found = {name: tensor for file in right.glob("*.safetensors") for name, tensor in load_file(file).items()}
    name = next(name for name in found if ".experts." in name and "down_proj" in name)
    change(right, name, flip_a_bit_of_16)
    (difference,) = verify(left, right).differences
    assert difference.name in inspect(left).table
    assert difference.text.startswith("1 of ")
    (difference,) = verify(right, left).differences
    assert difference.name == name


def flip_a_bit_of_16(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int16).view(-1)[5] ^= 1
    return tensor


def negative_zero(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0] = -0.0
    return tensor


def zero(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0] = 0.0
    return tensor


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0] = float("nan")
    return tensor


def test_zeros_of_two_signs_differ_and_a_nan_equals_itself(model, hf, tmp_path):
    name = "model.language_model.norm.weight"
    other = Path(shutil.copytree(hf, tmp_path / "other"))
    change(hf, name, zero)
    change(other, name, negative_zero)
    assert [d.text for d in verify(hf, other).differences] == ["1 of 64 values, first at [0]: 0.0 and -0.0"]
    change(hf, name, nan)
    change(other, name, nan)
    assert verify(hf, other).equal


def test_a_dtype_that_differs_is_a_difference(model, tmp_path):
    import_checkpoint(model / "hf", tmp_path / "half", dtype="bfloat16")
    report = verify(model / "hf", tmp_path / "half")
    assert len(report.differences) == len(inspect(model / "megatron").table)
    assert report.compared == 0
    assert "float32 and" in report.differences[0].text
    assert "bfloat16" in report.differences[0].text


def test_experts_in_two_dtypes_are_no_reason_to_call_them_equal(tmp_path):
    left = test_convert_moe.make(tmp_path / "a", "fused_out_in")
    right = test_convert_moe.make(tmp_path / "b", "per_expert")
    names = [name for name in inspect(right).table if ".experts.1.down_proj" in name]
    change(right, names[0], lambda tensor: tensor.float())
    assert not verify(left, right).equal
    assert not verify(right, left).equal


def test_experts_in_two_dtypes_are_not_equal_to_a_wider_tensor(tmp_path):
    """The values are the same: one expert in bfloat16 among others in float32, and all of them in float32."""
    wide = test_convert_moe.make(tmp_path / "a", "fused_out_in", fill=bits_without_nan)
    mixed = test_convert_moe.make(tmp_path / "b", "per_expert", fill=bits_without_nan)
    for folder in (wide, mixed):
        for name in inspect(folder).table:
            if ".experts." in name:
                change(folder, name, torch.Tensor.float)
    assert verify(wide, mixed).equal
    name = next(name for name in inspect(mixed).table if ".experts.1.down_proj" in name)
    change(mixed, name, torch.Tensor.bfloat16)
    (difference,) = verify(wide, mixed).differences
    assert "several dtypes" in difference.text
    assert verify(mixed, wide).differences[0].name == name


def test_models_of_other_sizes_differ_by_config_and_tensors(model, tmp_path):
    reference.write_checkpoint(tmp_path / "hf", layers=4)
    for folder, name in (("megatron", QKV), ("hf", "model.language_model.layers.3.self_attn.q_proj.weight")):
        report = verify(model / folder, tmp_path / "hf")
        assert report.differences[0] == Difference("config.json: text.num_layers", "2 and 4")
        assert name in [difference.name for difference in report.differences]


def test_checksums_find_rot_anywhere(model, tmp_path):
    """One bit in any file of either kind of result, and a file that is lost or longer."""
    megatron = Path(shutil.copytree(model / "megatron", tmp_path / "megatron"))
    back = export_checkpoint(megatron, tmp_path / "back")
    for folder in (megatron, back):
        assert verify_checksums(folder).equal
        skipped = ("latest_checkpointed_iteration.txt", CHECKSUMS)
        for path in [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in skipped]:
            content = path.read_bytes()
            for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-1], content + b"\0"):
                path.write_bytes(damaged)
                names = [difference.name for difference in verify_checksums(folder).differences]
                assert names == [path.relative_to(folder).as_posix()]
            path.unlink()
            assert "No such file" in verify_checksums(folder).differences[0].text
            path.write_bytes(content)
        assert verify_checksums(folder).equal


def hashes(folder: Path, of: Callable[[bytes], Any]) -> dict[str, list]:
    """The ranges of the manifest's files, with their checksums by `of`."""
    (files,) = (value for key, value in json.loads((folder / CHECKSUMS).read_text()).items() if key in ALGORITHMS)
    return {
        name: [[s, n, of((folder / name).read_bytes()[s : s + n]).hexdigest()] for s, n, _ in ranges]
        for name, ranges in files.items()
    }


def make_version_1(folder: Path) -> None:
    """The manifest as earlier versions wrote it."""
    manifest = json.loads((folder / CHECKSUMS).read_text())
    old = {"version": 1, "sha256": hashes(folder, hashlib.sha256), "origin": manifest["origin"]}
    (folder / CHECKSUMS).write_text(json.dumps(old, indent=1) + "\n")


def test_the_manifest_names_its_algorithm(model):
    manifest = json.loads((model / "megatron" / CHECKSUMS).read_text())
    assert manifest["version"] == 2
    assert manifest["blake3"] == hashes(model / "megatron", blake3)


def test_manifests_of_earlier_versions_are_verified(model, tmp_path):
    folder = Path(shutil.copytree(model / "megatron", tmp_path / "megatron"))
    make_version_1(folder)
    assert verify_checksums(folder).equal
    assert verify_checksums(folder).nbytes == verify_checksums(model / "megatron").nbytes
    path = next(folder.rglob("*.distcp"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [difference.name for difference in verify_checksums(folder).differences] == [f"release/{path.name}"]
    import_checkpoint(model / "hf", folder, resume=True)  # it is still the result of this import


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{}",
        '{"md5": {"x": [[0, 1, "a"]]}}',
        '{"sha256": {}, "blake3": {}}',
        '{"sha256": {"../x": [[0, 1, "a"]]}}',
        '{"blake3": {"x": [[0, -1, "a"]]}}',
    ],
)
def test_checksums_that_are_none_are_refused(text, hf):
    if text is not None:
        (hf / CHECKSUMS).write_text(text)
    with pytest.raises(VLBridgeError, match=CHECKSUMS):
        verify_checksums(hf)


def test_inspect_counts_the_same_in_both_forms(model):
    ours, theirs = inspect(model / "megatron"), inspect(model / "hf")
    assert ours.kind == "megatron"
    assert theirs.kind == "hugging face"
    assert ours.parameters == theirs.parameters
    tensors = [tensor for file in (model / "hf").glob("*.safetensors") for tensor in load_file(file).values()]
    assert sum(ours.parameters.values()) == sum(tensor.numel() for tensor in tensors)
    assert theirs.dtypes == {"float32": len(tensors)}
    vision = [n for name, n in ours.parameters.items() if name.startswith("vision")]
    assert sum(vision) == sum(
        tensor.numel()
        for file in (model / "hf").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".visual." in name
    )
    assert json.loads(json.dumps(ours.as_json()))["parameters"]["total"] == sum(ours.parameters.values())


def test_stages_are_even_where_they_can_be(tmp_path):
    found = inspect(reference.write_checkpoint(tmp_path / "hf", layers=4))
    assert found.stages(1) == [range(4)]
    assert found.stages(2) == [range(2), range(2, 4)]
    assert found.stages(3) == [range(1), range(1, 3), range(3, 4)]
    assert found.stages(4) == [range(stage, stage + 1) for stage in range(4)]
    for pp in (0, 5):
        with pytest.raises(UsageError, match="pp: expected 1 to 4 stages"):
            found.stages(pp)


def test_the_arguments_of_a_split_make_megatron_split_so():
    for layers, stages in product(range(2, 40), range(2, 12)):
        if layers < stages:
            continue
        sizes = split_layers(layers, stages)
        arguments = split_arguments(sizes)
        given = dict(zip(arguments[::2], map(int, arguments[1::2]), strict=True))
        config = SimpleNamespace(
            num_layers=layers,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=None,
            pipeline_model_parallel_layout=None,
            account_for_embedding_in_pipeline_split=False,
            account_for_loss_in_pipeline_split=False,
            num_layers_in_first_pipeline_stage=given.get("--decoder-first-pipeline-num-layers"),
            num_layers_in_last_pipeline_stage=given.get("--decoder-last-pipeline-num-layers"),
        )
        assert [get_num_layers_to_build(config, pp_rank=stage) for stage in range(stages)] == sizes
        assert sum(sizes) == layers
        assert (arguments == []) == (layers % stages == 0)
    assert split_layers(28, 3) == [9, 10, 9]
    assert split_layers(36, 8) == [3, 5, 5, 5, 5, 5, 5, 3]
