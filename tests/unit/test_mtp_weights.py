"""Checkpoints with a prediction layer: `mtp.*` survives bit for bit, its experts in a form of their own."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import ExpertForm
from megatron_vlbridge.weights import Region
from tests.mtp_reference import FILE, write_mtp_checkpoint
from tests.unit.test_convert import assert_same_bits, assert_side_files_are_the_same, tensors
from tests.unit.test_convert_moe import other_form

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FORMS = [form.value for form in ExpertForm]
BLOCK = "language_model.mtp.layers.0"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense ones, and those with experts, whose body is `fused_out_in`, by the form of the prediction layer's."""
    folder = tmp_path_factory.mktemp("mtp")
    kinds = {"untied": {}, "tied": {"tied": True}}
    kinds |= {form: {"experts": {}, "mtp_experts": form} for form in FORMS}
    return {kind: write_mtp_checkpoint(folder / kind, layers=2, **options) for kind, options in kinds.items()}


@pytest.mark.parametrize("kind", ["untied", "tied", *FORMS])
def test_there_and_back_is_the_same_folder(kind, sources, tmp_path):
    source = sources[kind]
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    found = tensors(tmp_path / "back")
    assert_same_bits(found, tensors(source))
    assert_side_files_are_the_same(tmp_path / "back", source)
    assert set(load_file(source / FILE)) == {name for name in found if name.startswith("mtp.")}
    assert verify(source, tmp_path / "megatron").equal


def test_the_layer_is_stored_under_megatrons_names(sources, tmp_path):
    folder = import_checkpoint(sources["untied"], tmp_path / "megatron")
    names = FileSystemReader(folder / "release").read_metadata().state_dict_metadata
    layer = f"{BLOCK}.transformer_layer"
    assert {name for name in names if ".mtp." in name and "_extra_state" not in name} == {
        f"{BLOCK}.enorm.weight",
        f"{BLOCK}.hnorm.weight",
        f"{BLOCK}.eh_proj.weight",
        f"{BLOCK}.final_layernorm.weight",
        f"{layer}.self_attention.linear_qkv.weight",
        f"{layer}.self_attention.linear_qkv.layer_norm_weight",
        f"{layer}.self_attention.q_layernorm.weight",
        f"{layer}.self_attention.k_layernorm.weight",
        f"{layer}.self_attention.linear_proj.weight",
        f"{layer}.mlp.linear_fc1.weight",
        f"{layer}.mlp.linear_fc1.layer_norm_weight",
        f"{layer}.mlp.linear_fc2.weight",
    }
    # The projection takes the embedding first, then the hidden states, on both sides.
    weights, hf = TorchDistFolder(folder), load_file(sources["untied"] / FILE)
    found = weights.read(Region.whole(f"{BLOCK}.eh_proj.weight", (64, 128)))
    assert torch.equal(found, hf["mtp.fc.weight"])


def test_every_form_of_the_layers_experts_is_one_megatron_checkpoint(sources, tmp_path):
    contents = []
    for form in FORMS:
        folder = import_checkpoint(sources[form], tmp_path / form) / "release"
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize(("form", "asked"), list(product(FORMS, FORMS)))
def test_an_export_in_another_form_keeps_the_layers_single_experts(form, asked, sources, tmp_path):
    import_checkpoint(sources[form], tmp_path / "megatron")
    found = tensors(export_checkpoint(tmp_path / "megatron", tmp_path / "back", experts=asked))
    wanted_mtp = "per_expert" if form == "per_expert" else asked
    expected = {}
    for name, tensor in tensors(sources["fused_out_in"]).items():
        wanted = wanted_mtp if name.startswith("mtp.") else asked
        turned = ".mlp.experts." in name and wanted != "fused_out_in"
        expected |= other_form(name, tensor, wanted) if turned else {name: tensor}
    assert_same_bits(found, {name: tensor.contiguous() for name, tensor in expected.items()})


def test_single_experts_need_no_word_on_the_orientation_of_others(tmp_path):
    """With a square weight the orientation of the body cannot be seen, that of single experts has none."""
    options = {"experts": {"moe_intermediate_size": 32}, "layers": 2}
    source = write_mtp_checkpoint(tmp_path / "hf", mtp_experts="per_expert", **options)
    with pytest.raises(VLBridgeError, match="orientation cannot be seen"):
        import_checkpoint(source, tmp_path / "megatron")
    import_checkpoint(source, tmp_path / "megatron", experts="fused_out_in")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))


def without_mtp(folder: Path, **options) -> Path:
    """A checkpoint whose config has an MTP layer and whose files do not, as transformers saves it."""
    write_mtp_checkpoint(folder, layers=4, **options)
    (folder / FILE).unlink()
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != FILE}
    index.write_text(json.dumps(content))
    return folder


def test_a_layer_whose_tensors_were_lost_is_refused(tmp_path):
    with pytest.raises(VLBridgeError, match=r"mtp\.\*: expected the tensors of the MTP layer"):
        import_checkpoint(without_mtp(tmp_path / "hf"), tmp_path / "megatron")


def test_a_part_of_the_layers_tensors_is_refused_by_name(sources, tmp_path):
    source = Path(shutil.copytree(sources["untied"], tmp_path / "hf"))
    found = load_file(source / FILE)
    save_file({name: x for name, x in found.items() if name != "mtp.fc.weight"}, source / FILE)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["mtp.fc.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(VLBridgeError, match=r"missing Hugging Face tensors \(1\):\s+mtp\.fc\.weight"):
        import_checkpoint(source, tmp_path / "megatron")


def test_a_layer_that_the_config_does_not_name_is_refused(sources, tmp_path):
    source = Path(shutil.copytree(sources["untied"], tmp_path / "hf"))
    content = json.loads((source / "config.json").read_text())
    del content["text_config"]["mtp_num_hidden_layers"]
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(VLBridgeError, match=r"mtp\.fc\.weight"):
        import_checkpoint(source, tmp_path / "megatron")
