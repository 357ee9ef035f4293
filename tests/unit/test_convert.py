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
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.hf.reader import INDEX
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
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


# As integers: -0.0, the least subnormal, both infinities, a signalling NaN, a NaN of all ones.
SPECIAL = {
    torch.bfloat16: (torch.int16, [-0x8000, 1, 0x7F80, -0x80, 0x7F81, -1]),
    torch.float16: (torch.int16, [-0x8000, 1, 0x7C00, -0x400, 0x7C01, -1]),
    torch.float32: (torch.int32, [-0x80000000, 1, 0x7F800000, -0x800000, 0x7F800001, -1]),
}


def bits(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Every pattern of bits is as likely as any other, and those that arithmetic treats in its own way are there."""
    kind, special = SPECIAL[dtype]
    numbers = torch.iinfo(kind)
    result = torch.randint(numbers.min, numbers.max + 1, shape).to(kind)
    result.view(-1)[: len(special)] = torch.tensor(special, dtype=kind)[: result.numel()]
    return result.view(dtype)


def bits_without_nan(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A conversion keeps all numbers, but not which NaN it was."""
    found = bits(shape, dtype)
    return torch.where(found.isnan(), torch.full_like(found, -1.5), found)


def normal(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that a model computes with."""
    return torch.randn(shape).to(dtype)


def save_model(model, folder: Path, shard: str, dtype: torch.dtype, fill) -> None:
    torch.manual_seed(0)
    model.to(dtype)
    for parameter in model.parameters():
        parameter.data = fill(parameter.shape, dtype)
    model.save_pretrained(folder, max_shard_size=shard)


def make(
    folder: Path, *, tie: bool = False, dtype: torch.dtype = torch.bfloat16, shard: str = "40KB", fill=bits
) -> Path:
    save_model(Qwen3VLForConditionalGeneration(tiny_config(tie)), folder, shard, dtype, fill)
    for name, content in SIDE_FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[bool, Path]:
    return {tie: make(tmp_path_factory.mktemp("source") / f"tied-{tie}", tie=tie) for tie in (False, True)}


@pytest.fixture
def source(sources, tmp_path) -> Path:
    return Path(shutil.copytree(sources[False], tmp_path / "hf"))


@pytest.fixture(scope="module")
def without_nan(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "without-nan", fill=bits_without_nan)


@pytest.fixture
def convertible(without_nan, tmp_path) -> Path:
    return Path(shutil.copytree(without_nan, tmp_path / "hf"))


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


@pytest.mark.parametrize("dtype", SPECIAL)
def test_the_random_weights_hold_what_only_bits_show(dtype):
    numbers = bits(torch.Size([100]), dtype)
    kind, special = SPECIAL[dtype]
    assert numbers.view(kind)[:6].tolist() == special
    assert torch.equal(numbers[:6].isnan(), torch.tensor([False] * 4 + [True] * 2))
    assert torch.equal(numbers[:6].isinf(), torch.tensor([False] * 2 + [True] * 2 + [False] * 2))
    assert numbers[1] == torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bits_without_nan(torch.Size([100]), dtype).isnan().sum() == 0


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", SPECIAL, ids=["bf16", "fp16", "fp32"])
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


def test_float32_tensors_among_bfloat16_stay_so(convertible, tmp_path):
    def change(found):
        for layer in range(3):
            found[NORM.format(layer)] = found[NORM.format(layer)].float() + 1e-7

    rewrite(convertible, change)
    import_checkpoint(convertible, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(convertible))


def test_a_dtype_is_converted_to_on_both_ways(convertible, tmp_path):
    import_checkpoint(convertible, tmp_path / "megatron", dtype=torch.float32)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", dtype="bfloat16")
    assert_same_bits(tensors(tmp_path / "back"), tensors(convertible))
    with pytest.raises(VLBridgeError, match="float8"):
        import_checkpoint(convertible, tmp_path / "other", dtype="float8")


def edit_config(folder: Path, change) -> bytes:
    """Change a config.json in the hand of a person, tabs and all, and give what it is now."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text("\n" + json.dumps(config, indent="\t", separators=(",", " : ")), "utf-8")
    return (folder / "config.json").read_bytes()


def in_both_parts(config):
    config["text_config"]["dtype"] = config["vision_config"]["dtype"] = "bfloat16"


def in_the_older_spelling(config):
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
        part["torch_dtype"] = "bfloat16"


def elsewhere_too(config):
    config["audio_config"] = {"dtype": "bfloat16"}
    config["auto_map"] = '"dtype": "bfloat16"'


@pytest.mark.parametrize("change", [in_both_parts, in_the_older_spelling, elsewhere_too])
@pytest.mark.parametrize("where", ["import", "export", "like", "run"])
def test_a_converted_checkpoint_names_its_dtype(where, change, convertible, tmp_path):
    """A loader that takes the dtype of the config would cast the weights back."""
    before = edit_config(convertible, change)
    assert before.count(b'"bfloat16"') >= 2
    if where == "import":
        import_checkpoint(convertible, tmp_path / "megatron", dtype="float32")
        assert AutoConfig.from_pretrained(tmp_path / "megatron" / "hf").dtype == torch.float32
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    elif where == "export":
        import_checkpoint(convertible, tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", dtype="float32")
    elif where == "like":
        import_checkpoint(convertible, tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", like=convertible, dtype="float32")
    else:
        wide = Path(shutil.copytree(convertible, tmp_path / "wide"))
        rewrite(wide, lambda found: found.update({name: tensor.float() for name, tensor in found.items()}))
        export_checkpoint(training_run(tmp_path / "run", wide), tmp_path / "back", like=convertible)
    after = (tmp_path / "back" / "config.json").read_bytes()
    elsewhere = b'"audio_config"' if change is elsewhere_too else b"no such key"
    head, key, tail = before.partition(elsewhere)
    assert after == head.replace(b'"bfloat16"', b'"float32"') + key + tail
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "back", dtype="auto").state_dict()
    assert_same_bits(loaded, {name: tensor.float() for name, tensor in tensors(convertible).items()})


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_config_that_names_the_written_dtype_stays_as_it_is(dtype, convertible, tmp_path):
    before = edit_config(convertible, lambda config: None)
    import_checkpoint(convertible, tmp_path / "megatron", dtype="float32")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", dtype="bfloat16")
    assert (tmp_path / "back" / "config.json").read_bytes() == before
    import_checkpoint(convertible, tmp_path / "same", dtype=dtype)
    export_checkpoint(tmp_path / "same", tmp_path / "again", dtype=dtype)
    assert (tmp_path / "again" / "config.json").read_bytes() == before


def test_a_run_beside_a_converted_import_names_its_own_dtype(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron", dtype="float32")
    training_run(tmp_path / "megatron", source)
    export_checkpoint(tmp_path / "megatron" / "iter_0000007", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    assert_side_files_are_the_same(tmp_path / "back", source)


def test_facts_of_an_import_with_a_damaged_dtype_are_refused(source, tmp_path):
    facts = import_checkpoint(source, tmp_path / "megatron") / "hf" / "vlbridge.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"dtype": "float99"}))
    with pytest.raises(VLBridgeError, match=r"vlbridge\.json: dtype: expected one or null, found 'float99'"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")


def test_a_config_that_never_named_the_dtype_of_its_weights_comes_back_byte_by_byte(source, tmp_path):
    before = edit_config(source, lambda config: config.update(dtype="float32"))
    import_checkpoint(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == before


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
    refuse(tied, tmp_path / "megatron", "lm_head.weight: expected the values of")


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
