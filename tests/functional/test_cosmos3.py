"""The reasoner of Cosmos3: Qwen3-VL under other names, in files that also hold a generator."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.import_plan import plan_import
from megatron_vlbridge.checkpoint.verify import verify
from tests import reference
from tests.errors import rejects
from tests.functional import matrix
from tests.functional.kinds import Variant
from tests.functional.pool import Layout, Pool

CLASSES = "Cosmos3Omni"
# Beside the reasoner, one for each pattern of what transformers leaves out.
GENERATOR = (
    *("layers.0.self_attn.add_q_proj.weight", "layers.0.self_attn.add_k_proj.weight"),
    *("layers.0.self_attn.add_v_proj.weight", "layers.1.self_attn.to_add_out.weight"),
    *("layers.0.self_attn.norm_added_q.weight", "layers.0.self_attn.norm_added_k.weight"),
    *("layers.3.mlp_moe_gen.up_proj.weight", "norm_moe_gen.weight", "proj_out.weight", "proj_in.weight"),
    *("time_embedder.linear_1.weight", "audio_proj_out.weight", "audio_proj_in.weight", "audio_modality_embed"),
    *("action_proj_out.fc.weight", "action_proj_in.fc.weight", "action_modality_embed"),
)


# Those of the reasoner's layers are read under the prefix of its layers.
HUB_NAMES = [f"model.language_model.{name}" if name.startswith(("layers", "norm")) else name for name in GENERATOR]


def values(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers loads them, by its own names."""
    from transformers import Cosmos3OmniForConditionalGeneration

    model, info = Cosmos3OmniForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return dict(model.state_dict())


def assert_loads_the_same(found: Path, expected: Path) -> None:
    ours, theirs = values(found), values(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return reference.write_checkpoint(tmp_path / "hf", classes=CLASSES)


def publish(source: Path, folder: Path) -> Path:
    """As on the Hub: shards in folders of their own, which the index names, among them tensors of the generator."""
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    tower = {name for name in tensors if name.startswith(("blocks", "merger", "patch", "pos", "deepstack"))}
    assert tower
    weight_map = {}
    for place, chosen in (
        ("vision_encoder/model.safetensors", {name: tensors[name] for name in tower}),
        (
            "transformer/model.safetensors",
            {name: tensor for name, tensor in tensors.items() if name not in tower}
            | {name: torch.ones(3, 2) for name in GENERATOR},
        ),
    ):
        (folder / place).parent.mkdir(parents=True)
        save_file(chosen, folder / place)
        weight_map |= dict.fromkeys(chosen, place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((source / "config.json").read_text())
    # As vLLM lists it: transformers goes by the model type.
    config["architectures"] = ["Cosmos3ForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_names_of_diffusers_are_read_and_those_of_transformers_written(saved: Path, tmp_path: Path) -> None:
    back = export_checkpoint(import_checkpoint(saved, tmp_path / "megatron"), tmp_path / "back")
    assert_loads_the_same(back, saved)
    assert verify(saved, back).equal
    names = {name for file in back.glob("*.safetensors") for name in load_file(file)}
    assert all(name.startswith(("model.language_model.", "model.visual.", "lm_head.")) for name in names)


def test_the_generator_is_left_out(saved: Path, tmp_path: Path) -> None:
    from transformers import Cosmos3OmniForConditionalGeneration

    for pattern in Cosmos3OmniForConditionalGeneration._keys_to_ignore_on_load_unexpected:
        assert any(re.search(pattern, name) for name in GENERATOR), pattern
    published = publish(saved, tmp_path / "published")
    (note,) = (note for note in plan_import(published, tmp_path / "x").notes if "not part of the model" in note)
    assert f"{len(GENERATOR)} tensors" in note
    imported = import_checkpoint(published, tmp_path / "megatron")
    for number, like in enumerate((None, published)):
        back = export_checkpoint(imported, tmp_path / f"back{number}", like=like)
        assert_loads_the_same(back, published)
        assert not verify(published, back).equal
        assert verify(published, back, ignore=HUB_NAMES).equal
        assert verify(published, imported).equal
        assert {name for file in back.glob("*.safetensors") for name in load_file(file)} == values(saved).keys()


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True, pp=2, world=4)], ids=str)
def test_a_layout_equals_transformers(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    """The other layouts are Qwen3-VL's, whose class builds this model too."""
    folders = {
        ("dense", False, tied): reference.write_checkpoint(tmp_path / str(tied), tied=tied, classes=CLASSES)
        for tied in (False, True)
    }
    for errors in matrix.run(pool, "dense", layout, [Variant(), Variant("uniform", tied=True)], folders):
        errors.check()


def test_a_changed_shard_of_another_folder_with_the_same_name_is_seen(saved: Path, tmp_path: Path) -> None:
    published = publish(saved, tmp_path / "published")
    import_checkpoint(published, tmp_path / "megatron")
    assert plan_import(published, tmp_path / "megatron").is_complete()
    tower = published / "vision_encoder" / "model.safetensors"
    save_file({name: tensor + 7 for name, tensor in load_file(tower).items()}, tower)
    with rejects("weights.", "model.safetensors"):
        plan_import(published, tmp_path / "megatron").is_complete()
