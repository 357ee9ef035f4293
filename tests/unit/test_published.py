"""Every form in which checkpoints are published, bit for bit: names, files, dtypes, tensors that are no part."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_vlbridge import cli
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.export_plan import plan_export
from megatron_vlbridge.checkpoint.hf.reader import INDEX, SafetensorsFolder
from megatron_vlbridge.checkpoint.import_plan import plan_import
from megatron_vlbridge.checkpoint.inspect import inspect
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.aliases import PARTS, hub_names
from tests.unit import test_convert, test_convert_moe
from tests.unit.test_convert import NORM, assert_same_bits, rewrite, tensors, training_run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TEXT, VISION, HEAD = (part.hub for part in PARTS)
Q = TEXT + "layers.{}.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {
        "dense": test_convert.make(folder / "dense", shard="40KB"),
        "tied": test_convert.make(folder / "tied", tie=True),
        "experts": test_convert_moe.make(folder / "experts", "per_expert"),
    }


@pytest.fixture
def source(sources, tmp_path) -> Path:
    return Path(shutil.copytree(sources["dense"], tmp_path / "hf"))


@pytest.fixture(scope="module")
def without_nan(tmp_path_factory) -> Path:
    fill = test_convert.bits_without_nan
    return test_convert.make(tmp_path_factory.mktemp("published") / "without-nan", fill=fill)


@pytest.fixture
def convertible(without_nan, tmp_path) -> Path:
    return Path(shutil.copytree(without_nan, tmp_path / "hf"))


def respell(folder: Path, text: str, vision: str, head: str, wrapper: str = "") -> None:
    """The same shards and index with other names, as another tool would have written them."""
    others = {TEXT: text, VISION: vision, HEAD: head}

    def other(name: str) -> str:
        part = next(part for part in others if name.startswith(part))
        return wrapper + others[part] + name.removeprefix(part)

    for path in folder.glob("*.safetensors"):
        save_file({other(name): tensor for name, tensor in test_convert.load_file(path).items()}, path)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {other(name): file for name, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))


SPELLINGS = {
    "older": ("model.", "visual.", "lm_head."),
    "inner": ("language_model.", "visual.", "lm_head."),
    "engine": ("language_model.model.", "visual.", "language_model.lm_head."),
    "doubled": ("model.language_model.model.", "model.visual.", "lm_head."),
    "half": ("model.language_model.", "visual.", "lm_head."),
    "bare": ("", "visual.", "lm_head."),
    "headed": ("model.language_model.", "model.visual.", "model.lm_head."),
    "wrapped": ("model.language_model.", "model.visual.", "lm_head.", "module."),
    "older-wrapped": ("model.", "visual.", "lm_head.", "module."),
}


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [*((spelling, "dense") for spelling in SPELLINGS), ("older", "tied"), ("older", "experts"), ("bare", "experts")],
)
def test_other_names_are_read_and_the_hubs_are_written(spelling, kind, sources, tmp_path):
    source = Path(shutil.copytree(sources[kind], tmp_path / "hf"))
    respell(source, *SPELLINGS[spelling])
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(sources[kind]))
    found = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]
    assert found == json.loads((sources[kind] / INDEX).read_text())["weight_map"]
    for other in (sources[kind], tmp_path / "megatron", tmp_path / "back"):
        assert verify(source, other).equal
    assert inspect(source).parameters == inspect(sources[kind]).parameters


def test_a_training_run_is_exported_like_a_folder_with_other_names(sources, source, tmp_path):
    respell(source, *SPELLINGS["older"])
    run = training_run(tmp_path / "run", sources["dense"])
    export_checkpoint(run, tmp_path / "back", like=source)
    assert_same_bits(tensors(tmp_path / "back"), tensors(sources["dense"]))


def test_the_plan_and_the_inspection_say_which_names_are_read_as_which(source, tmp_path, capsys):
    respell(source, *SPELLINGS["older"])
    assert cli.main(["import", str(source), str(tmp_path / "megatron"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "names model.* are read as model.language_model.*" in told
    assert "names visual.* are read as model.visual.*" in told
    assert "lm_head" not in told
    assert cli.main(["inspect", str(source)]) == 0
    assert "names visual.* are read as model.visual.*" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (NORM.format(1), "model.layers.1.input_layernorm.weight"),
        ("model.visual.pos_embed.weight", "visual.pos_embed.weight"),
        (HEAD + "weight", "language_model.lm_head.weight"),
    ],
)
def test_two_spellings_of_one_part_are_refused(name, other, source, tmp_path):
    rewrite(source, lambda found: found.update({other: found[name].clone()}))
    with pytest.raises(VLBridgeError, match="one prefix for all names") as caught:
        import_checkpoint(source, tmp_path / "megatron")
    assert other in str(caught.value)
    assert str(source) in str(caught.value)


def test_names_that_are_no_part_stay_as_they_are():
    names = ["mtp.fc.weight", "normal.weight", "model.visualise.x", "audio.layers.0.x", "lm_head.bias"]
    assert hub_names(names, "folder") == ({name: name for name in names}, [])


# --- files ---


@pytest.mark.parametrize("named", [False, True], ids=["stray", "indexed"])
def test_one_file_beside_an_index_is_read_only_where_the_index_names_it(named, source, tmp_path):
    expected = tensors(source)
    if named:
        rewrite(source, lambda found: None)
        (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(expected, "model.safetensors")}))
        import_checkpoint(source, tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
        assert_same_bits(tensors(tmp_path / "back"), expected)
    else:
        save_file(expected, source / "model.safetensors")
        with pytest.raises(VLBridgeError, match=r"model\.safetensors: expected no file of this name beside"):
            import_checkpoint(source, tmp_path / "megatron")


def test_two_indexes_of_other_names_are_refused(source):
    shutil.copy(source / INDEX, source / "b.safetensors.index.json")
    assert SafetensorsFolder(source).table
    (source / INDEX).rename(source / "a.safetensors.index.json")
    with pytest.raises(VLBridgeError, match=r"one index, found a\.safetensors\.index\.json, b\."):
        SafetensorsFolder(source)


# --- config.json ---


def as_4_57(config: dict) -> dict:
    """As the published files have it: `rope_theta` beside `rope_scaling`, `torch_dtype` for `dtype`."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    result = config | {"text_config": text, "vision_config": vision, "transformers_version": "4.57.0.dev0"}
    for part in (result, text, vision):
        part["torch_dtype"] = part.pop("dtype", "bfloat16")
    return result


@pytest.mark.parametrize("kind", ["dense", "tied", "experts"])
def test_a_config_of_transformers_4_57_comes_back_and_means_the_same(kind, sources, tmp_path):
    source = Path(shutil.copytree(sources[kind], tmp_path / "hf"))
    config = as_4_57(json.loads((source / "config.json").read_text()))
    assert "rope_parameters" not in config["text_config"]
    (source / "config.json").write_text(json.dumps(config, indent=4))
    import_checkpoint(source, tmp_path / "megatron")
    import_checkpoint(sources[kind], tmp_path / "newer")
    for path in (tmp_path / "newer" / "release").iterdir():
        assert (tmp_path / "megatron" / "release" / path.name).read_bytes() == path.read_bytes()
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(sources[kind]))
    test_convert.assert_side_files_are_the_same(tmp_path / "back", source)


# --- dtypes ---


def in_float32(*names):
    """Those tensors in float32, with numbers that bfloat16 does not hold."""

    def change(found):
        for name in names:
            found[name] = found[name].float() * (1 + 2**-20)

    return change


@pytest.mark.parametrize(
    "names",
    [
        [NORM.format(1)],
        [NORM.format(0), NORM.format(2)],
        [Q.format(0)],
        [HEAD + "weight"],
        [VISION + "pos_embed.weight"],
    ],
    ids=["one-layer", "two-layers", "q-alone", "head", "vision"],
)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_each_tensor_keeps_its_own_dtype(base, names, request, tmp_path):
    """In bfloat16 with its bits, also where they are no number."""
    folder = request.getfixturevalue("source" if base == torch.bfloat16 else "convertible")
    rewrite(folder, lambda found: found.update({name: tensor.to(base) for name, tensor in found.items()}))
    rewrite(folder, in_float32(*names))
    import_checkpoint(folder, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(folder))
    export_checkpoint(tmp_path / "megatron" / "release", tmp_path / "again", like=folder)
    assert_same_bits(tensors(tmp_path / "again"), tensors(folder))
    assert verify(folder, tmp_path / "megatron").equal
    assert verify(folder, tmp_path / "back").equal


def test_a_stack_of_several_dtypes_is_held_in_the_wider_and_the_plan_says_so(source, tmp_path):
    rewrite(source, in_float32(NORM.format(1)))
    import_checkpoint(source, tmp_path / "megatron")
    table = FileSystemReader(tmp_path / "megatron" / "release").read_metadata().state_dict_metadata
    wide = [n for n, e in table.items() if getattr(e, "properties", None) and e.properties.dtype == torch.float32]
    assert wide == ["language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight"]
    notes = plan_import(source, tmp_path / "other").summary()["notes"]
    assert notes == [f"{wide[0]}: float32, as some of its parts are; the others are in 16 bits"]


def test_a_dtype_that_was_asked_for_is_that_of_all(source, tmp_path):
    rewrite(source, in_float32(NORM.format(1)))
    import_checkpoint(source, tmp_path / "megatron", dtype="float32")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), {name: tensor.float() for name, tensor in tensors(source).items()})


def test_verify_sees_a_dtype_within_a_stack(source, tmp_path):
    rewrite(source, in_float32(NORM.format(1), NORM.format(2)))
    other = Path(shutil.copytree(source, tmp_path / "other"))
    rewrite(other, lambda found: found.update({NORM.format(0): found[NORM.format(0)].float()}))
    rewrite(source, lambda found: found.update({NORM.format(0): found[NORM.format(0)].float()}))
    assert verify(source, other).equal
    rewrite(other, lambda found: found.update({NORM.format(0): found[NORM.format(0)].bfloat16()}))
    rewrite(source, lambda found: found.update({NORM.format(1): found[NORM.format(0)].bfloat16()}))
    assert [d.name for d in verify(source, other).differences][:2] == [NORM.format(0), NORM.format(1)]


def test_numbers_trained_since_are_not_cut_silently(convertible, tmp_path):
    """A run that saves float32 where one layer began in 16 bits: its numbers fit no longer."""
    rewrite(convertible, lambda found: found.update({name: tensor.float() for name, tensor in found.items()}))
    run = training_run(tmp_path / "run", convertible)
    like = Path(shutil.copytree(convertible, tmp_path / "like"))
    rewrite(like, lambda found: found.update({NORM.format(1): found[NORM.format(1)].bfloat16()}))
    export_checkpoint(run, tmp_path / "exact", like=like)
    assert_same_bits(tensors(tmp_path / "exact"), tensors(like))
    rewrite(convertible, in_float32(*(NORM.format(layer) for layer in range(3))))
    shutil.rmtree(run)
    training_run(run, convertible)
    with pytest.raises(VLBridgeError, match=r"layers\.1\.input_layernorm\.weight: expected float32 values that fit"):
        export_checkpoint(run, tmp_path / "cut", like=like)
    assert not (tmp_path / "cut").exists()
    export_checkpoint(run, tmp_path / "whole", like=like, dtype="float32")
    assert_same_bits(tensors(tmp_path / "whole"), tensors(convertible))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_among_layers_are_refused(dtype, source, tmp_path):
    rewrite(source, lambda found: found.update({NORM.format(1): found[NORM.format(1)].to(dtype)}))
    with pytest.raises(VLBridgeError, match=r"layers\.1\.input_layernorm\.weight"):
        import_checkpoint(source, tmp_path / "megatron")


# --- tensors that are no part of the model ---

EXTRAS = {
    "foo.bar": torch.arange(5),
    "model.language_model.rotary_emb.inv_freq": torch.arange(8) / 7,
    "scales.x": torch.arange(6).view(2, 3).half(),
}


def test_extra_tensors_are_refused_unless_they_are_named(source, tmp_path):
    rewrite(source, lambda found: found.update(EXTRAS))
    with pytest.raises(VLBridgeError, match=r"(?s)extra Hugging Face.*foo\.bar.*rotary_emb.*--ignore"):
        import_checkpoint(source, tmp_path / "megatron")
    with pytest.raises(VLBridgeError, match=r"rotary_emb\.inv_freq"):
        import_checkpoint(source, tmp_path / "megatron", ignore=["foo.*", "scales.?"])
    patterns = ["foo.*", "*.rotary_emb.*", "scales.x"]
    (note,) = plan_import(source, tmp_path / "megatron", ignore=patterns).summary()["notes"]
    assert note == f"ignored, as not part of the model: 3 tensors: {', '.join(sorted(EXTRAS, key=patterns_order))}"
    import_checkpoint(source, tmp_path / "megatron", ignore=patterns)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), {n: t for n, t in tensors(source).items() if n not in EXTRAS})
    assert verify(source, tmp_path / "megatron", ignore=patterns).equal
    names = [difference.name for difference in verify(source, tmp_path / "megatron").differences]
    assert names == sorted(EXTRAS)


def patterns_order(name: str) -> int:
    return list(EXTRAS).index(name)


@pytest.mark.parametrize("pattern", ["*", "lm_head.*", "model.visual.blocks.0.*", "nothing.*", NORM.format(0)])
def test_what_the_model_needs_cannot_be_ignored(pattern, source, tmp_path):
    rewrite(source, lambda found: found.update(EXTRAS))
    with pytest.raises(VLBridgeError, match="ignore: expected"):
        import_checkpoint(source, tmp_path / "megatron", ignore=["foo.bar", pattern])


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "shards"])
def test_extra_tensors_of_like_are_copied_unchanged(sharded, source, tmp_path):
    run = training_run(tmp_path / "run", source)
    if sharded:
        save_file(EXTRAS, source / "extra.safetensors")
        index = json.loads((source / INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(EXTRAS, "extra.safetensors")
        (source / INDEX).write_text(json.dumps(index))
    else:
        rewrite(source, lambda found: found.update(EXTRAS))
    for number, size in enumerate((None, 20_000)):
        back = export_checkpoint(run, tmp_path / f"back-{number}", like=source, max_shard_size=size)
        assert_same_bits(tensors(back), tensors(source))
        assert verify(back, source).equal
    notes = plan_export(run, tmp_path / "x", like=source).summary()["notes"]
    copied = f"copied unchanged from {source}, as not part of the model: 3 tensors: "
    assert [note.startswith(copied) for note in notes].count(True) == 1


def test_verify_compares_extra_tensors_too(source, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    rewrite(source, lambda found: found.update(EXTRAS))
    rewrite(other, lambda found: found.update(EXTRAS | {"foo.bar": torch.arange(5).flip(0)}))
    (difference,) = verify(source, other).differences
    assert difference.name == "foo.bar"
    assert difference.text == "4 of 5 values, first at [0]: 0 and 4"


# --- Megatron folders of other tools ---


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "model."])
def test_a_wrapped_megatron_checkpoint_is_exported(prefix, source, tmp_path):
    from torch.distributed.checkpoint import FileSystemWriter, save

    from megatron_vlbridge import read_config
    from megatron_vlbridge.families import find

    config = read_config(source)
    state = {prefix + name: tensor for name, tensor in find(config).table(config).to_megatron(tensors(source)).items()}
    save(state, storage_writer=FileSystemWriter(tmp_path / "run"), no_dist=True)
    (tmp_path / "run" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    export_checkpoint(tmp_path / "run", tmp_path / "back", like=source)
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    assert verify(tmp_path / "run", source).equal


def test_keys_that_do_not_agree_are_named(source, tmp_path):
    run = training_run(tmp_path / "run", source)
    metadata = run / "iter_0000007" / ".metadata"
    content = metadata.read_bytes()
    assert b"linear_qkv.weight" in content
    metadata.write_bytes(content.replace(b"linear_qkv.weight", b"linear_abc.weight"))
    with pytest.raises(
        VLBridgeError, match=r"(?s)missing Megatron.*linear_qkv\.weight.*extra Megatron.*linear_abc\.weight"
    ):
        export_checkpoint(run, tmp_path / "back", like=source)
