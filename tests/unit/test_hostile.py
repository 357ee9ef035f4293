"""Hundreds of damaged and hostile checkpoints from one seed: each is refused by name, or changes nothing.

"By name": every damage says what it damaged, a file, tensor or key, and the message must name it. "Changes nothing" is
proved: what was made from the damaged folder holds, bit for bit, the weights of the sound one.
"""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.formats import TRACKER
from megatron_vlbridge.checkpoint.hf.reader import INDEX
from megatron_vlbridge.checkpoint.inspect import inspect, table_lines
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS, verify_checksums
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import VLBridgeError
from tests import reference
from tests.unit.time_limit import limit

SEED = int(os.environ.get("VLBRIDGE_SEED", "0"))
ROUNDS = 8  # of each kind of damage
Culprits = str | tuple[str, ...]
Damage = Callable[[Path, random.Random], Culprits]
"""Damages a folder, and says what a message must name: this, or one of these."""


@dataclass(frozen=True)
class Sound:
    """A folder to be damaged, the Hugging Face folder with the same weights, and the Megatron folder with them."""

    folder: Path
    hf: Path
    megatron: Path


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Sound]:
    folder = tmp_path_factory.mktemp("sound")
    hf, megatron = reference.write_checkpoint(folder / "hf", layers=2), folder / "megatron"
    import_checkpoint(hf, megatron)
    return {"hf": Sound(hf, hf, megatron), "megatron": Sound(megatron, hf, megatron)}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def a_tensor(folder: Path, chance: random.Random) -> tuple[Path, str]:
    """A shard, and the name of a tensor in it."""
    path = chance.choice(shards(folder))
    return path, chance.choice(sorted(load_file(path)))


UNPRINTABLE = ["\0", "\x1b[2J", "\n", "\x9b", "\ud800", "\udfff"]


# --- any file: of either folder ---


def truncated(folder: Path, chance: random.Random) -> Culprits:
    path = a_file(folder, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))
    return path.name


def emptied(folder: Path, chance: random.Random) -> Culprits:
    path = a_file(folder, chance)
    path.write_bytes(b"")
    return path.name


def removed(folder: Path, chance: random.Random) -> Culprits:
    path = a_file(folder, chance)
    path.unlink()
    return path.name


def garbage(folder: Path, chance: random.Random) -> Culprits:
    path = a_file(folder, chance)
    path.write_bytes(chance.randbytes(path.stat().st_size))
    return path.name


def one_byte_of_the_head(folder: Path, chance: random.Random) -> Culprits:
    path = a_file(folder, chance)
    content = bytearray(path.read_bytes())
    content[chance.randrange(min(8, len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path.name


def renamed(folder: Path, chance: random.Random) -> Culprits:
    path = a_file(folder, chance)
    path.rename(path.with_name("x" + path.name))
    return path.name


def cyclic_link(folder: Path, chance: random.Random) -> Culprits:
    path = a_file(folder, chance)
    path.unlink()
    path.symlink_to(path.name)
    return path.name


def a_folder_instead(folder: Path, chance: random.Random) -> Culprits:
    path = a_file(folder, chance)
    path.unlink()
    path.mkdir()
    return path.name


def a_pipe_instead(folder: Path, chance: random.Random) -> Culprits:
    """Whose reading would wait for ever."""
    path = a_file(folder, chance)
    path.unlink()
    os.mkfifo(path)
    return path.name


def a_device_instead(folder: Path, chance: random.Random) -> Culprits:
    """Whose reading has no end, or nothing in it."""
    path = a_file(folder, chance)
    path.unlink()
    path.symlink_to(chance.choice(["/dev/zero", "/dev/null"]))
    return path.name


def a_file(folder: Path, chance: random.Random) -> Path:
    """A file that weights cannot be read without."""
    names = [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("config.json")]
    names += [*folder.glob("release/*"), *folder.glob("release/.metadata")]
    return chance.choice(sorted(set(names)))


ANY = [
    *(truncated, emptied, removed, garbage, one_byte_of_the_head),
    *(renamed, cyclic_link, a_folder_instead, a_pipe_instead, a_device_instead),
]

# --- Hugging Face folders ---


def swapped_shards(folder: Path, chance: random.Random) -> Culprits:
    a, b = chance.sample(shards(folder), 2)
    a.rename(folder / "spare")
    b.rename(a)
    (folder / "spare").rename(b)
    return a.name, b.name


def doubled_tensor(folder: Path, chance: random.Random) -> Culprits:
    a, b = chance.sample(shards(folder), 2)
    ours, theirs = load_file(a), load_file(b)
    name = chance.choice(sorted(ours))
    save_file({**theirs, name: ours[name]}, b)
    return name


def lost_tensor(folder: Path, chance: random.Random) -> Culprits:
    path = chance.choice(shards(folder))
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    del tensors[name]
    save_file(tensors, path)
    return name


def renamed_tensor(folder: Path, chance: random.Random) -> Culprits:
    path, name = a_tensor(folder, chance)
    edit_header(path, lambda header: header.update({name + ".bak": header.pop(name)}))
    return name


def wrong_dtype(folder: Path, chance: random.Random) -> Culprits:
    path, name = a_tensor(folder, chance)
    dtype = chance.choice(["BF16", "F16", "I32", "F8_E4M3", "F99", 7, None])
    edit_header(path, lambda header: header[name].update(dtype=dtype))
    return name


def converted_tensor(folder: Path, chance: random.Random) -> Culprits:
    """One layer in another dtype, in a file that is sound in itself."""
    path = chance.choice([path for path in shards(folder) if any(".layers." in name for name in load_file(path))])
    tensors = load_file(path)
    name = chance.choice(sorted(name for name in tensors if ".layers." in name))
    tensors[name] = tensors[name].to(chance.choice([torch.float8_e4m3fn, torch.int8, torch.float64]))
    save_file(tensors, path)
    return name


def wrong_shape(folder: Path, chance: random.Random) -> Culprits:
    path, name = a_tensor(folder, chance)

    def edit(header: dict) -> None:
        shape = header[name]["shape"]
        shape[chance.randrange(len(shape))] += chance.choice([-1, 1, 2**62, -(2**62), 2**70])

    edit_header(path, edit)
    return name


def reshaped_tensor(folder: Path, chance: random.Random) -> Culprits:
    """As many numbers in another shape, in a file that is sound in itself."""
    path = chance.choice([path for path in shards(folder) if any(t.ndim == 2 for t in load_file(path).values())])
    tensors = load_file(path)
    name = chance.choice(sorted(name for name, tensor in tensors.items() if tensor.ndim == 2))
    tensors[name] = tensors[name].reshape(1, *tensors[name].shape)
    save_file(tensors, path)
    return name


def shifted_offsets(folder: Path, chance: random.Random) -> Culprits:
    path, name = a_tensor(folder, chance)

    def edit(header: dict) -> None:
        step = chance.choice([-4, 4, 2**63, -(2**63)])
        header[name]["data_offsets"] = [value + step for value in header[name]["data_offsets"]]

    edit_header(path, edit)
    return name


def huge_header(folder: Path, chance: random.Random) -> Culprits:
    path = chance.choice(shards(folder))
    length = chance.choice([2**63, 2**40, 10**8, path.stat().st_size])
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    return path.name


def deep_header(folder: Path, chance: random.Random) -> Culprits:
    text = b'{"a":' * chance.choice([1000, 200_000])
    path = chance.choice(shards(folder))
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path.name


def long_integer(folder: Path, chance: random.Random) -> Culprits:
    """More digits than Python reads, or one short of it."""
    digits = b"9" * chance.choice([5000, 4299])
    path = chance.choice([*shards(folder), folder / INDEX, folder / "config.json"])
    if path.suffix == ".json":
        path.write_bytes(path.read_bytes().replace(b"{", b'{"x": ' + digits + b", ", 1))
        return path.name
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    text = content[8:end].replace(b'"shape":[', b'"shape":[' + digits + b"," + digits + b",", 1)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    return path.name


def unprintable_tensor(folder: Path, chance: random.Random) -> Culprits:
    """A name that a C string ends in, that a terminal obeys, or that is no text."""
    path, name = a_tensor(folder, chance)
    other = chance.choice(UNPRINTABLE) + name
    edit_header(path, lambda header: header.update({other: header.pop(name)}))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({other: index["weight_map"].pop(name)}))
    return repr(other)[1:40]


def unprintable_side_file(folder: Path, chance: random.Random) -> Culprits:
    name = chance.choice(["a\nb.txt", "\x1b[2J.json", "\udcff.txt"])
    (folder / name).write_text("x")
    return repr(name)


def twice_in_a_long_header(folder: Path, chance: random.Random) -> Culprits:
    """Found in one pass over the names, however many."""
    path, name = a_tensor(folder, chance)
    names = [*(f"x{number}" for number in range(50_000)), name, name]
    text = ("{" + ",".join(f'"{name}":0' for name in names) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return name


def index_points_elsewhere(folder: Path, chance: random.Random) -> Culprits:
    places = ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "none.safetensors", "", "\0.safetensors", 3, None]
    places += [["a"], "config.json", "..", "model.safetensors\n", ".safetensors", "\ud800.safetensors"]
    places += ["x" * 300 + ".safetensors", "sub\\x.safetensors", "\x1b[2J.safetensors"]
    _, name = a_tensor(folder, chance)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: chance.choice(places)}))
    return name


def index_names_another(folder: Path, chance: random.Random) -> Culprits:
    path, name = a_tensor(folder, chance)
    other = chance.choice([shard.name for shard in shards(folder) if shard != path])
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: other}))
    return name


def index_is_short(folder: Path, chance: random.Random) -> Culprits:
    _, name = a_tensor(folder, chance)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    return name


def config_of_another_size(folder: Path, chance: random.Random) -> Culprits:
    """Refused for the value itself, or for a tensor that it does not fit."""
    config = json.loads((folder / "config.json").read_text())
    part = chance.choice(["text_config", "vision_config"])
    key = chance.choice(sorted(key for key, value in config[part].items() if type(value) is int and value > 1))
    value = config[part][key]
    config[part][key] = chance.choice([value + 1, value * 2, -1, 0, "8", None, 2**70, [value]])
    (folder / "config.json").write_text(json.dumps(config))
    return key, "language_model.", "visual.", "vision_model."


def config_without_measure(folder: Path, chance: random.Random) -> Culprits:
    """A number that would fill the memory, or that no float holds."""
    keys = [("text_config", "num_hidden_layers"), ("vision_config", "depth"), ("text_config", "hidden_size")]
    part, key = chance.choice([*keys, ("text_config", "rms_norm_eps"), ("vision_config", "num_position_embeddings")])
    value = chance.choice([10**400, 10**4000] if key == "rms_norm_eps" else [10**9, 2**63, 10**400, 10**4000])
    edit_json(folder / "config.json", lambda config: config[part].update({key: value}))
    return key, "language_model.", "visual.", "vision_model."


def config_of_another_kind(folder: Path, chance: random.Random) -> Culprits:
    changes = [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": [], "model_type": "x"},
        {"text_config": []},
        {"quantization_config": {"quant_method": "fp8"}},
        {"tie_word_embeddings": True},
        {"auto_map": {"AutoModel": "evil.Model"}, "architectures": ["evil.Model"]},
        {"dtype": "int4", "torch_dtype": "int4"},
        {"vision_config": None},
    ]
    change = chance.choice(changes)
    edit_json(folder / "config.json", lambda config: config.update(change))
    return (*change, "language_model.output_layer")


HF = [
    *(swapped_shards, doubled_tensor, lost_tensor, renamed_tensor, wrong_dtype, converted_tensor, wrong_shape),
    *(reshaped_tensor, shifted_offsets, huge_header, deep_header, index_points_elsewhere, index_names_another),
    *(
        index_is_short,
        config_of_another_size,
        config_without_measure,
        config_of_another_kind,
        long_integer,
        unprintable_tensor,
    ),
    *(unprintable_side_file, twice_in_a_long_header),
]

# --- Megatron folders ---


def edit_metadata(folder: Path, edit: Callable[[Any], Any]) -> Any:
    """Edit the metadata in place, and return what the edit returns."""
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    result = edit(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return result


def a_weight(metadata, chance: random.Random) -> str:
    return chance.choice(sorted(name for name in metadata.state_dict_metadata if name.endswith(("weight", "bias"))))


def a_place(metadata, chance: random.Random):
    """The name of a weight, and where one of its chunks is."""
    name = a_weight(metadata, chance)
    chunk = chance.choice(metadata.state_dict_metadata[name].chunks)
    return name, metadata.storage_data[MetadataIndex(name, chunk.offsets)]


class Hostile:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def hostile_pickle(folder: Path, chance: random.Random) -> Culprits:
    mark = str(folder / "hostile-was-here")
    calls = [
        (os.system, (f"touch {mark}",)),
        (eval, (f"open({mark!r}, 'w')",)),
        (open, (mark, "w")),
        (os.mkdir, (mark,)),
    ]
    calls += [(shutil.rmtree, (str(folder),)), (torch.load, (mark,)), (exec, (f"open({mark!r}, 'w')",))]
    hostile = Hostile(*chance.choice(calls))
    if chance.random() < 0.5:
        (folder / "release" / ".metadata").write_bytes(pickle.dumps(hostile, protocol=chance.randrange(6)))
    else:
        edit_metadata(folder, lambda metadata: setattr(metadata, "planner_data", hostile))
    return ".metadata"


def hostile_tensor(folder: Path, chance: random.Random) -> Culprits:
    """Where the numbers of a chunk should be, a pickle that would run code if it were loaded as one."""
    mark = str(folder / "hostile-was-here")
    file = folder / "release" / "__0_0.distcp"
    metadata = pickle.loads((folder / "release" / ".metadata").read_bytes())
    name, place = a_place(metadata, chance)
    harm = folder / "harm.pt"
    torch.save([Hostile(os.system, (f"touch {mark}",))], harm)
    content = harm.read_bytes()
    harm.unlink()
    with file.open("r+b") as stream:
        stream.seek(place.offset)
        stream.write((content + bytes(place.length))[: place.length])
    return name


def chunk_elsewhere(folder: Path, chance: random.Random) -> Culprits:
    values = [
        (
            "relative_path",
            chance.choice(["../x", "/etc/passwd", "__9_9.distcp", "", 7, None, "a/b.distcp", "\0.distcp"]),
        ),
        ("offset", chance.choice([-1, 1, 2**62, "0", None])),
        ("length", chance.choice([-1, 0, 3, 2**62, None])),
        ("transform_descriptors", ["zstd"]),
    ]
    key, value = chance.choice(values)

    def edit(metadata) -> str:
        name, place = a_place(metadata, chance)
        setattr(place, key, value)
        return name

    return edit_metadata(folder, edit)


def chunks_swapped(folder: Path, chance: random.Random) -> Culprits:
    """Two chunks of different shapes, each in the other's place."""

    def edit(metadata) -> tuple[str, ...]:
        names = sorted(name for name in metadata.state_dict_metadata if name.endswith("weight"))
        a, b = chance.sample(names, 2)
        while metadata.state_dict_metadata[a].chunks[0].sizes == metadata.state_dict_metadata[b].chunks[0].sizes:
            a, b = chance.sample(names, 2)
        keys = [MetadataIndex(name, metadata.state_dict_metadata[name].chunks[0].offsets) for name in (a, b)]
        store = metadata.storage_data
        store[keys[0]], store[keys[1]] = store[keys[1]], store[keys[0]]
        return a, b

    return edit_metadata(folder, edit)


def entry_renamed(folder: Path, chance: random.Random) -> Culprits:
    def edit(metadata) -> str:
        name = a_weight(metadata, chance)
        metadata.state_dict_metadata[name + "x"] = metadata.state_dict_metadata.pop(name)
        return name

    return edit_metadata(folder, edit)


def entry_lost(folder: Path, chance: random.Random) -> Culprits:
    def edit(metadata) -> str:
        name = a_weight(metadata, chance)
        del metadata.state_dict_metadata[name]
        return name

    return edit_metadata(folder, edit)


def entry_is_wrong(folder: Path, chance: random.Random) -> Culprits:
    def edit(metadata) -> str:
        name = a_weight(metadata, chance)
        entry = metadata.state_dict_metadata[name]
        kind = chance.randrange(5)
        if kind == 0:
            entry.size = torch.Size([size + 1 for size in entry.size])
        elif kind == 1:
            entry.chunks.append(entry.chunks[0])
        elif kind == 2:
            entry.chunks.pop()
        elif kind == 3:
            entry.properties.dtype = chance.choice([torch.int8, torch.float64, torch.bfloat16])
        else:
            entry.chunks[0].offsets = torch.Size([1 + offset for offset in entry.chunks[0].offsets])
        return name

    return edit_metadata(folder, edit)


def metadata_of_other_types(folder: Path, chance: random.Random) -> Culprits:
    """A part of the metadata is of another type, or is missing."""

    def edit(metadata) -> str:
        name, place = a_place(metadata, chance)
        entry = metadata.state_dict_metadata[name]
        things = [(metadata, "storage_data", "storage_data"), (metadata, "state_dict_metadata", "state_dict_metadata")]
        things += [(entry, key, name) for key in ("chunks", "size", "properties")]
        things += [(entry.chunks[0], key, name) for key in ("offsets", "sizes")]
        things += [(place, key, name) for key in ("relative_path", "offset", "length")]
        thing, key, culprit = chance.choice(things)
        if chance.random() < 0.2:
            vars(thing).pop(key)
        else:
            setattr(thing, key, chance.choice([None, [], ["x"], "x", {}, 7.5, b"x", (2**70,), ("x",)]))
        return culprit

    return edit_metadata(folder, edit)


def entry_under_another_key(folder: Path, chance: random.Random) -> Culprits:
    """A name that is none, that cannot be printed, or of which a layer's number cannot be read."""

    def edit(metadata) -> str:
        entries = metadata.state_dict_metadata
        entry = entries.pop(a_weight(metadata, chance))
        other = chance.choice([7, None, ("x",), *UNPRINTABLE, "decoder.layers." + "9" * 5000 + ".weight"])
        entries[other] = entry
        return "state_dict_metadata"

    return edit_metadata(folder, edit)


def chunk_is_no_chunk(folder: Path, chance: random.Random) -> Culprits:
    def edit(metadata) -> str:
        name = a_weight(metadata, chance)
        metadata.state_dict_metadata[name].chunks[0] = chance.choice(["x", None, [], 7, {}, b"x"])
        return name

    return edit_metadata(folder, edit)


def huge_pickle(folder: Path, chance: random.Random) -> Culprits:
    """A pickle of a few bytes that says that it holds more than any memory."""
    codes = [b"\x8e", b"\x8d", b"\x96"]  # BINBYTES8, BINUNICODE8, BYTEARRAY8
    length = chance.choice([2**62, 2**63, 2**64 - 1, 2**40])
    content = b"\x80\5" + chance.choice(codes) + struct.pack("<Q", length)
    (folder / "release" / ".metadata").write_bytes(content + chance.randbytes(8))
    return ".metadata"


def pickle_that_changes_classes(folder: Path, chance: random.Random) -> Culprits:
    """BUILD, which gives an object its attributes, on what the whole process shares."""
    names = [b"cpathlib\nPosixPath\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n"]
    changed = chance.choice(names)
    attributes = b"(N}X\4\0\0\0evil" + chance.choice(names) + b"st"
    (folder / "release" / ".metadata").write_bytes(b"\x80\2" + changed + attributes + b"b0" + b"N.")
    return ".metadata"


def tracker_is_wrong(folder: Path, chance: random.Random) -> Culprits:
    text = chance.choice(["", "../release", "-1", "7", "release/..", "\0", "9" * 5000, "iter_0000001"])
    (folder / TRACKER).write_text(text)
    return TRACKER


def format_is_wrong(folder: Path, chance: random.Random) -> Culprits:
    text = chance.choice(
        ["", "[]", '{"sharded_backend": "zarr"}', '{"sharded_backend": 1}', "{" * 9999, '{"a":1,"a":2}']
    )
    (folder / "release" / "metadata.json").write_text(text)
    return "metadata.json"


def manifest_is_wrong(folder: Path, chance: random.Random) -> Culprits:
    facts = json.loads((folder / "hf" / "vlbridge.json").read_text())
    name = chance.choice(sorted(facts["tensors"]))
    fact = facts["tensors"][name]
    changes = [["../x.safetensors", *fact[1:]], ["x.bin", *fact[1:]], 7, [fact[0]], [fact[0], "x", []]]
    changes += [[start + fact[0], *fact[1:]] for start in UNPRINTABLE]
    facts["tensors"][name] = chance.choice(changes)
    (folder / "hf" / "vlbridge.json").write_text(json.dumps(facts))
    return name


MEGATRON = [
    *(hostile_pickle, hostile_tensor, chunk_elsewhere, chunks_swapped, entry_renamed, entry_lost),
    *(entry_is_wrong, tracker_is_wrong, format_is_wrong, manifest_is_wrong, metadata_of_other_types),
    *(entry_under_another_key, chunk_is_no_chunk, huge_pickle, pickle_that_changes_classes),
]

CASES = [*(("hf", damage) for damage in [*ANY, *HF]), *(("megatron", damage) for damage in [*ANY, *MEGATRON])]


IDS = [f"{kind}-{damage.__name__}" for kind, damage in CASES]


@pytest.mark.parametrize(("kind", "damage"), CASES, ids=IDS)
def test_damage_is_refused_by_name_or_changes_nothing(kind, damage, sound, tmp_path):
    check(kind, damage, sound[kind], tmp_path)


@pytest.mark.parametrize(("kind", "damage"), CASES, ids=IDS)
def test_damage_is_told_or_harmless_to_those_who_only_read(kind, damage, sound, tmp_path):
    check_readers(kind, damage, sound[kind], tmp_path)


def make_damaged(kind: str, damage: Damage, number: int, folder: Path, damaged: Path) -> Culprits:
    """A damaged copy, the same whenever it is made, and what is damaged."""
    shutil.copytree(folder, damaged)
    return damage(damaged, random.Random(f"{SEED} {kind} {damage.__name__} {number}"))


def check(kind: str, damage: Damage, sound: Sound, tmp_path: Path) -> None:
    """Damage copies of a folder; what is made from one is refused by name, or holds the weights of the sound one."""
    refused = 0
    for number in range(ROUNDS):
        damaged, target = tmp_path / f"damaged-{number}", tmp_path / f"made-{number}"
        culprits = make_damaged(kind, damage, number, sound.folder, damaged)
        message, _ = attempt(convert, kind, damaged, target)
        assert not (damaged / "hostile-was-here").exists()
        assert damaged.is_dir()
        if message is None:
            assert verify(target, sound.hf).equal, f"round {number}: a silent change"
        else:
            refused += 1
            assert names(message, damaged, culprits), f"round {number}: expected one of {culprits!r} in {message}"
            assert not target.exists()
    assert refused, "this damage was never found"


def check_readers(kind: str, damage: Damage, sound: Sound, tmp_path: Path) -> None:
    """Of a damaged folder that converts, `inspect` and `verify` say what they say of the sound one.

    `verify` says so besides only where no file with weights is changed. As `--like` of an export, a damaged folder is
    refused or gives the weights of the sound one, beside its own tensors that are no part of the model.
    """
    for number in range(ROUNDS // 2):
        damaged, target, exported = (tmp_path / f"{what}-{number}" for what in ("damaged", "made", "exported"))
        culprits = make_damaged(kind, damage, number, sound.folder, damaged)
        like = damaged / "hf" if kind == "megatron" else damaged
        uses: dict[str, Callable[[], Any]] = {
            "convert": partial(convert, kind, damaged, target),
            "inspect": partial(look, damaged),
            "verify": partial(verify, damaged, sound.folder),
        }
        if kind != "megatron" or contents(like) != contents(sound.folder / "hf"):
            uses["like"] = partial(export_checkpoint, sound.megatron, exported, like=like)
        results = {use: attempt(function) for use, function in uses.items()}
        for use, (message, _) in results.items():
            told = message is None or names(message, damaged, culprits)
            assert told, f"{use}, round {number}: expected one of {culprits!r} in {message}"
        report = results["verify"][1]
        if results["convert"][0] is None:
            assert results["inspect"][1] == look(sound.folder)
            assert report.equal
        elif report is not None and report.equal:
            assert contents(damaged, ".safetensors", ".distcp") == contents(sound.folder, ".safetensors", ".distcp")
        if exported.exists():
            assert verify(exported, sound.hf, ignore=as_tuple(culprits)).equal
        assert not (damaged / "hostile-was-here").exists()


def look(folder: Path) -> tuple:
    """What `inspect` finds, after printing it in both forms."""
    found = inspect(folder)
    "\n".join([*table_lines(found), json.dumps(found.as_json())]).encode()
    return found.table, found.config


def names(message: str, folder: Path, culprits: Culprits) -> bool:
    """Whether an error names the folder, and what is damaged in it."""
    text = message.replace(str(folder.parent), "")
    return folder.name in text and any(name in text for name in as_tuple(culprits))


def as_tuple(culprits: Culprits) -> tuple[str, ...]:
    return (culprits,) if isinstance(culprits, str) else culprits


def attempt(use: Callable, *args) -> tuple[str | None, Any]:
    """The message of the refusal, or the result. Any other error ends the test, and so does a use that has no end."""
    try:
        with limit():
            return None, use(*args)
    except VLBridgeError as error:
        return str(error), None


def convert(kind: str, folder: Path, target: Path) -> Path:
    return (export_checkpoint if kind == "megatron" else import_checkpoint)(folder, target)


def contents(folder: Path, *suffixes: str) -> list[bytes]:
    """What is in the regular files of a folder, all or those of some kinds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and (path.suffix in suffixes or not suffixes)]
    return [path.read_bytes() for path in files]


@pytest.mark.parametrize(
    "change",
    [
        {"\0": [[0, 1, "x"]]},
        {"\ud800": [[0, 1, "x"]]},
        {"x" * 5000: [[0, 1, "x"]]},
        {"../hf": [[0, 1, "x"]]},
        {"release": [[0, 0, "x"]]},
        {"pipe": [[0, 0, "x"]]},
        {"release/.metadata": [[0, 10**4000, "x"]]},
        {"release/.metadata": [[2**62, 0, "x"]]},
        {"release/.metadata": [[-1, 1, "x"]]},
        {"release/.metadata": [7]},
    ],
    ids=lambda change: repr(change)[:30],
)
def test_damaged_checksums_are_refused_or_found_to_differ(change, sound, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(sound["megatron"].folder, folder)
    os.mkfifo(folder / "pipe")
    edit_json(folder / CHECKSUMS, lambda checksums: checksums["blake3"].update(change))
    message, report = attempt(verify_checksums, folder)
    name = next(iter(change))
    if message is None:
        assert [difference.name for difference in report.differences] == [name]
    else:
        assert names(message, folder, (name, repr(name)))
        assert CHECKSUMS in message
