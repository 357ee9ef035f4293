"""Import and export of whole folders: bit for bit there and back, and nothing at all after an error."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from megatron_vlbridge.checkpoint.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.safetensors import INDEX
from megatron_vlbridge.config import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import find
from megatron_vlbridge.weights import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
NORM = "model.language_model.layers.{}.input_layernorm.weight"
SIDE_FILES = {
    "tokenizer.json": b'{"a":  1}\n',
    "chat_template.jinja": b"{{ x }}",
    "preprocessor_config.json": b"{}",
    "merges.txt": b"a b\r\n",
    "LICENSE": b"text",
}


ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_parameters": ROPE,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
TOKENS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 8, "vision_end_token_id": 9}


def tiny_config(tie: bool) -> Qwen3VLConfig:
    return Qwen3VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=tie, **TOKENS)


def make(folder: Path, *, tie: bool = False, dtype: torch.dtype = torch.bfloat16, shard: str = "40KB") -> Path:
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(tiny_config(tie))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name, content in SIDE_FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[bool, Path]:
    return {tie: make(tmp_path_factory.mktemp("source") / f"tied-{tie}", tie=tie) for tie in (False, True)}


@pytest.fixture
def source(sources, tmp_path) -> Path:
    return Path(shutil.copytree(sources[False], tmp_path / "hf"))


@pytest.fixture
def tied(sources, tmp_path) -> Path:
    return Path(shutil.copytree(sources[True], tmp_path / "hf"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change) -> None:
    """Put changed tensors back as one file."""
    found = tensors(folder)
    change(found)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_side_files_are_the_same(found: Path, expected: Path) -> None:
    weights = (".safetensors", INDEX, CHECKSUMS)
    names = {path.name for path in expected.iterdir() if not path.name.endswith(weights)}
    assert names == {path.name for path in found.iterdir() if not path.name.endswith(weights)}
    assert all((found / name).read_bytes() == (expected / name).read_bytes() for name in names)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shard", ["40KB", "1GB"], ids=["shards", "one-file"])
def test_there_and_back_is_the_same_folder(tie, dtype, shard, tmp_path):
    source = make(tmp_path / "hf", tie=tie, dtype=dtype, shard=shard)
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    assert_side_files_are_the_same(tmp_path / "back", source)
    assert {p.name for p in source.iterdir()} | {CHECKSUMS} == {p.name for p in (tmp_path / "back").iterdir()}
    if (source / INDEX).exists():
        assert (tmp_path / "back" / INDEX).read_bytes() == (source / INDEX).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron", "back"}


def test_the_megatron_tensors_are_those_of_the_rules_as_torch_reads_them(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    dcp_to_torch_save(tmp_path / "megatron" / "release", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=False)
    config = read_config(source)
    expected = find(config).table(config).to_megatron(tensors(source))
    assert_same_bits({name: value for name, value in found.items() if isinstance(value, torch.Tensor)}, expected)


def test_transformers_loads_the_export(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", max_shard_size=30_000)
    before = Qwen3VLForConditionalGeneration.from_pretrained(source).state_dict()
    after = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    assert_same_bits(after, before)


def test_max_shard_size_decides_the_shards(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "one", max_shard_size=10**9)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    export_checkpoint(tmp_path / "megatron", tmp_path / "many", max_shard_size=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert_same_bits(tensors(tmp_path / "one"), tensors(source))
    assert_same_bits(tensors(tmp_path / "many"), tensors(source))


def test_float32_tensors_among_bfloat16_stay_so(source, tmp_path):
    def change(found):
        for layer in range(3):
            found[NORM.format(layer)] = found[NORM.format(layer)].float() + 1e-7

    rewrite(source, change)
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))


def test_a_dtype_is_converted_to_on_both_ways(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron", dtype=torch.float32)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", dtype="bfloat16")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    with pytest.raises(VLBridgeError, match="float8"):
        import_checkpoint(source, tmp_path / "other", dtype="float8")


def test_a_tied_head_that_is_stored_comes_back(tied, tmp_path):
    rewrite(tied, lambda found: found.update({HEAD: found[EMBEDDING].clone()}))
    import_checkpoint(tied, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert HEAD in tensors(tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(tied))


def test_a_tied_head_that_differs_is_refused(tied, tmp_path):
    def change(found):
        found[HEAD] = found[EMBEDDING].clone()
        found[HEAD][3, 5] += 1

    rewrite(tied, change)
    refuse(tied, tmp_path / "megatron", "lm_head.weight: expected the numbers of")


def refuse(source: Path, target: Path, reason: str) -> None:
    with pytest.raises(VLBridgeError, match=reason):
        import_checkpoint(source, target)
    assert [path.name for path in target.parent.iterdir()] == [source.name]


def drop(name):
    return lambda found: found.pop(name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop(HEAD), "missing Hugging Face tensors[\\s\\S]*lm_head.weight"),
        (drop(NORM.format(2)), "layers.2.input_layernorm.weight: expected \\[32\\]"),
        (lambda found: found.update(stray=torch.zeros(3)), "extra Hugging Face tensors[\\s\\S]*stray"),
        (lambda found: found.update({NORM.format(0): torch.zeros(33)}), "expected \\[32\\], found \\[33\\]"),
        (lambda found: found.update({EMBEDDING: torch.zeros(61, 32, dtype=torch.bfloat16)}), "found \\[61, 32\\]"),
        (lambda found: found.update({EMBEDDING: found[EMBEDDING].T}), "found \\[32, 60\\]"),
    ],
    ids=["no-head", "missing", "extra", "shape", "padded", "transposed"],
)
def test_tensors_that_do_not_fit_are_refused(change, reason, source, tmp_path):
    rewrite(source, change)
    refuse(source, tmp_path / "megatron", reason)


def test_a_missing_shard_is_refused(source, tmp_path):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(source, tmp_path / "megatron", shard.name)


def test_a_truncated_shard_is_refused(source, tmp_path):
    shard = sorted(source.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 5)
    refuse(source, tmp_path / "megatron", f"{shard.name}.*truncated")


def test_an_index_that_points_out_of_the_folder_is_refused(source, tmp_path):
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][HEAD] = "../other.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    refuse(source, tmp_path / "megatron", "lm_head.weight: expected the name of a safetensors file")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("architectures", ["Qwen3_5ForConditionalGeneration"], "model_type"),
        ("architectures", ["Other"], "Other"),
        ("image_token_id", 60, "image_token_id"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(key, value, reason, source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    refuse(source, tmp_path / "megatron", reason)


def test_a_target_that_exists_is_refused_and_left_alone(source, tmp_path):
    target = tmp_path / "megatron"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(VLBridgeError, match="megatron: expected a name that is free"):
        import_checkpoint(source, target)
    assert [path.name for path in target.iterdir()] == ["mine"]


@pytest.mark.parametrize("limit", [1, 5_000, 60_000])
def test_a_disk_that_ends_in_the_middle_leaves_nothing(limit, source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(VLBridgeError, match="other: expected to write it"):
            import_checkpoint(source, tmp_path / "other")
        with pytest.raises(VLBridgeError, match="other: expected to write it"):
            export_checkpoint(tmp_path / "megatron", tmp_path / "other", max_shard_size=10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}


def training_run(folder: Path, source: Path, *, padding: int = 0, unstacked: bool = False) -> Path:
    """What a Megatron run leaves: an iteration with weights and optimizer state, and no Hugging Face files."""
    config, found = read_config(source), tensors(source)
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    state = find(config).table(config, find(config).find_expert_form(config, specs)).to_megatron(found)
    for name in [name for name in state if name.endswith(("word_embeddings.weight", "output_layer.weight"))]:
        state[name] = torch.cat([state[name], torch.full((padding, 32), 7, dtype=state[name].dtype)])
    if unstacked:
        for name in [name for name in state if "language_model.decoder.layers." in name]:
            stack = state.pop(name)
            state |= {name.replace("layers.", f"layers.{i}."): stack[i].clone() for i in range(len(stack))}
    state |= {f"optimizer.state.exp_avg.{name}": tensor.float() for name, tensor in state.items()}
    place = folder / "iter_0000007"
    save(state, storage_writer=FileSystemWriter(place), no_dist=True)
    (place / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("unstacked", [False, True], ids=["stacked", "unstacked"])
def test_a_training_run_is_exported_like_its_start(padding, unstacked, source, tmp_path):
    run = training_run(tmp_path / "run", source, padding=padding, unstacked=unstacked)
    export_checkpoint(run, tmp_path / "back", like=source)
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    assert_side_files_are_the_same(tmp_path / "back", source)
    export_checkpoint(run / "iter_0000007", tmp_path / "again", like=source)
    assert_same_bits(tensors(tmp_path / "again"), tensors(source))


def test_a_training_run_that_is_tied_is_exported_without_a_head(tied, tmp_path):
    run = training_run(tmp_path / "run", tied, padding=4)
    export_checkpoint(run, tmp_path / "back", like=tied)
    assert_same_bits(tensors(tmp_path / "back"), tensors(tied))


def test_a_run_saved_beside_an_import_needs_no_like(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    training_run(tmp_path / "megatron", source)
    export_checkpoint(tmp_path / "megatron" / "iter_0000007", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))


def test_like_may_hold_no_weights(source, tmp_path):
    run = training_run(tmp_path / "run", source)
    like = tmp_path / "like"
    shutil.copytree(source, like, ignore=shutil.ignore_patterns("*.safetensors*"))
    export_checkpoint(run, tmp_path / "back", like=like)
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))


def test_an_export_that_knows_no_config_is_refused(source, tmp_path):
    run = training_run(tmp_path / "run", source)
    with pytest.raises(VLBridgeError, match="like="):
        export_checkpoint(run, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_export_whose_tensors_do_not_fit_is_refused(source, tmp_path):
    run = training_run(tmp_path / "run", source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        VLBridgeError, match=r"Megatron tensors of the wrong shape[\s\S]*expected \[2, 32\], found \[3, 32\]"
    ):
        export_checkpoint(run, tmp_path / "back", like=like)
    with pytest.raises(VLBridgeError, match="max_shard_size"):
        export_checkpoint(run, tmp_path / "back", like=source, max_shard_size=0)
    assert not (tmp_path / "back").exists()
