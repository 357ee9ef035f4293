"""Hundreds of damaged and hostile checkpoints from one seed: each is refused by name, or changes nothing.

"Changes nothing" is proved: what was made from the damaged folder holds, bit for bit, the weights of the sound one.
"""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.safetensors import INDEX
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.errors import VLBridgeError
from tests import reference

SEED = int(os.environ.get("VLBRIDGE_SEED", "0"))
ROUNDS = 8  # of each kind of damage
Damage = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """`hf`, and `megatron` made from it."""
    folder = tmp_path_factory.mktemp("sound")
    import_checkpoint(reference.write_checkpoint(folder / "hf", layers=2), folder / "megatron")
    return folder


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


def tensor_of(header: dict, chance: random.Random) -> str:
    return chance.choice(sorted(header.keys() - {"__metadata__"}))


# --- any file: of either folder ---


def truncated(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))


def emptied(folder: Path, chance: random.Random) -> None:
    a_file(folder, chance).write_bytes(b"")


def removed(folder: Path, chance: random.Random) -> None:
    a_file(folder, chance).unlink()


def garbage(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    path.write_bytes(chance.randbytes(path.stat().st_size))


def one_byte_of_the_head(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    content = bytearray(path.read_bytes())
    content[chance.randrange(min(8, len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def renamed(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    path.rename(path.with_name("x" + path.name))


def cyclic_link(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    path.unlink()
    path.symlink_to(path.name)


def a_folder_instead(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    path.unlink()
    path.mkdir()


def a_pipe_instead(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    path.unlink()
    path.symlink_to("/dev/null")


def a_file(folder: Path, chance: random.Random) -> Path:
    """A file that weights cannot be read without."""
    names = [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("config.json")]
    names += [*folder.glob("release/*"), *folder.glob("release/.metadata")]
    return chance.choice(sorted(set(names)))


ANY = [
    *(truncated, emptied, removed, garbage, one_byte_of_the_head),
    *(renamed, cyclic_link, a_folder_instead, a_pipe_instead),
]

# --- Hugging Face folders ---


def swapped_shards(folder: Path, chance: random.Random) -> None:
    a, b = chance.sample(shards(folder), 2)
    a.rename(folder / "spare")
    b.rename(a)
    (folder / "spare").rename(b)


def doubled_tensor(folder: Path, chance: random.Random) -> None:
    a, b = chance.sample(shards(folder), 2)
    ours, theirs = load_file(a), load_file(b)
    name = chance.choice(sorted(ours))
    save_file({**theirs, name: ours[name]}, b)


def lost_tensor(folder: Path, chance: random.Random) -> None:
    path = chance.choice(shards(folder))
    tensors = load_file(path)
    tensors.pop(chance.choice(sorted(tensors)))
    save_file(tensors, path)


def renamed_tensor(folder: Path, chance: random.Random) -> None:
    def edit(header: dict) -> None:
        name = tensor_of(header, chance)
        header[name + ".bak"] = header.pop(name)

    edit_header(chance.choice(shards(folder)), edit)


def wrong_dtype(folder: Path, chance: random.Random) -> None:
    other = ["BF16", "F16", "I32", "F8_E4M3", "F99", 7, None]
    edit_header(chance.choice(shards(folder)), lambda h: h[tensor_of(h, chance)].update(dtype=chance.choice(other)))


def converted_tensor(folder: Path, chance: random.Random) -> None:
    """One layer in another dtype, in a file that is sound in itself."""
    path = chance.choice([path for path in shards(folder) if any(".layers." in name for name in load_file(path))])
    tensors = load_file(path)
    name = chance.choice(sorted(name for name in tensors if ".layers." in name))
    tensors[name] = tensors[name].to(chance.choice([torch.float8_e4m3fn, torch.int8, torch.float64]))
    save_file(tensors, path)


def wrong_shape(folder: Path, chance: random.Random) -> None:
    def edit(header: dict) -> None:
        shape = header[tensor_of(header, chance)]["shape"]
        shape[chance.randrange(len(shape))] += chance.choice([-1, 1, 2**62, -(2**62)])

    edit_header(chance.choice(shards(folder)), edit)


def reshaped_tensor(folder: Path, chance: random.Random) -> None:
    """As many numbers in another shape, in a file that is sound in itself."""
    path = chance.choice([path for path in shards(folder) if any(t.ndim == 2 for t in load_file(path).values())])
    tensors = load_file(path)
    name = chance.choice(sorted(name for name, tensor in tensors.items() if tensor.ndim == 2))
    tensors[name] = tensors[name].reshape(1, *tensors[name].shape)
    save_file(tensors, path)


def shifted_offsets(folder: Path, chance: random.Random) -> None:
    def edit(header: dict) -> None:
        step = chance.choice([-4, 4, 2**63, -(2**63)])
        entry = header[tensor_of(header, chance)]
        entry["data_offsets"] = [value + step for value in entry["data_offsets"]]

    edit_header(chance.choice(shards(folder)), edit)


def huge_header(folder: Path, chance: random.Random) -> None:
    path = chance.choice(shards(folder))
    length = chance.choice([2**63, 2**40, 10**8, path.stat().st_size])
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def deep_header(folder: Path, chance: random.Random) -> None:
    text = b'{"a":' * chance.choice([1000, 200_000])
    chance.choice(shards(folder)).write_bytes(struct.pack("<Q", len(text)) + text)


def index_points_elsewhere(folder: Path, chance: random.Random) -> None:
    places = ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "none.safetensors", "", "\0.safetensors", 3, None]
    places += [["a"], "config.json", "..", "model.safetensors\n"]

    def edit(index: dict) -> None:
        index["weight_map"][chance.choice(sorted(index["weight_map"]))] = chance.choice(places)

    edit_json(folder / INDEX, edit)


def index_names_another(folder: Path, chance: random.Random) -> None:
    def edit(index: dict) -> None:
        name = chance.choice(sorted(index["weight_map"]))
        other = {file for file in index["weight_map"].values() if file != index["weight_map"][name]}
        index["weight_map"][name] = chance.choice(sorted(other))

    edit_json(folder / INDEX, edit)


def index_is_short(folder: Path, chance: random.Random) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(chance.choice(sorted(index["weight_map"]))))


def config_of_another_size(folder: Path, chance: random.Random) -> None:
    def edit(config: dict) -> None:
        part = config[chance.choice(["text_config", "vision_config"])]
        key = chance.choice(sorted(key for key, value in part.items() if type(value) is int and value > 1))
        part[key] = chance.choice([part[key] + 1, part[key] * 2, -1, 0, "8", None, 2**70, [part[key]]])

    edit_json(folder / "config.json", edit)


def config_of_another_kind(folder: Path, chance: random.Random) -> None:
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
    edit_json(folder / "config.json", lambda config: config.update(chance.choice(changes)))


HF = [
    *(swapped_shards, doubled_tensor, lost_tensor, renamed_tensor, wrong_dtype, converted_tensor, wrong_shape),
    *(reshaped_tensor, shifted_offsets, huge_header, deep_header, index_points_elsewhere, index_names_another),
    *(index_is_short, config_of_another_size, config_of_another_kind),
]

# --- Megatron folders ---


def edit_metadata(folder: Path, edit: Callable[[object], object]) -> None:
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def a_weight(metadata, chance: random.Random) -> str:
    return chance.choice(sorted(name for name in metadata.state_dict_metadata if name.endswith(("weight", "bias"))))


def a_place(metadata, chance: random.Random):
    name = a_weight(metadata, chance)
    chunk = chance.choice(metadata.state_dict_metadata[name].chunks)
    return metadata.storage_data[MetadataIndex(name, chunk.offsets)]


class Hostile:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def hostile_pickle(folder: Path, chance: random.Random) -> None:
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


def hostile_tensor(folder: Path, chance: random.Random) -> None:
    """Where the numbers of a chunk should be, a pickle that would run code if it were loaded as one."""
    mark = str(folder / "hostile-was-here")
    file = folder / "release" / "__0_0.distcp"
    metadata = pickle.loads((folder / "release" / ".metadata").read_bytes())
    place = a_place(metadata, chance)
    harm = folder / "harm.pt"
    torch.save([Hostile(os.system, (f"touch {mark}",))], harm)
    content = harm.read_bytes()
    harm.unlink()
    with file.open("r+b") as stream:
        stream.seek(place.offset)
        stream.write((content + bytes(place.length))[: place.length])
    if len(content) <= place.length:
        edit_metadata(folder, lambda metadata: None)


def chunk_elsewhere(folder: Path, chance: random.Random) -> None:
    values = [
        ("relative_path", chance.choice(["../x", "/etc/passwd", "__9_9.distcp", "", 7, None, "a/b.distcp"])),
        ("offset", chance.choice([-1, 1, 2**62, "0", None])),
        ("length", chance.choice([-1, 0, 3, 2**62, None])),
        ("transform_descriptors", ["zstd"]),
    ]
    name, value = chance.choice(values)
    edit_metadata(folder, lambda metadata: setattr(a_place(metadata, chance), name, value))


def chunks_swapped(folder: Path, chance: random.Random) -> None:
    """Two chunks of different shapes, each in the other's place."""

    def edit(metadata) -> None:
        names = sorted(name for name in metadata.state_dict_metadata if name.endswith("weight"))
        a, b = chance.sample(names, 2)
        while metadata.state_dict_metadata[a].chunks[0].sizes == metadata.state_dict_metadata[b].chunks[0].sizes:
            a, b = chance.sample(names, 2)
        keys = [MetadataIndex(name, metadata.state_dict_metadata[name].chunks[0].offsets) for name in (a, b)]
        store = metadata.storage_data
        store[keys[0]], store[keys[1]] = store[keys[1]], store[keys[0]]

    edit_metadata(folder, edit)


def entry_renamed(folder: Path, chance: random.Random) -> None:
    def edit(metadata) -> None:
        name = a_weight(metadata, chance)
        metadata.state_dict_metadata[name + "x"] = metadata.state_dict_metadata.pop(name)

    edit_metadata(folder, edit)


def entry_lost(folder: Path, chance: random.Random) -> None:
    edit_metadata(folder, lambda metadata: metadata.state_dict_metadata.pop(a_weight(metadata, chance)))


def entry_is_wrong(folder: Path, chance: random.Random) -> None:
    def edit(metadata) -> None:
        entry = metadata.state_dict_metadata[a_weight(metadata, chance)]
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

    edit_metadata(folder, edit)


def tracker_is_wrong(folder: Path, chance: random.Random) -> None:
    text = chance.choice(["", "../release", "-1", "7", "release/..", "\0", "9" * 5000, "iter_0000001"])
    (folder / "latest_checkpointed_iteration.txt").write_text(text)


def format_is_wrong(folder: Path, chance: random.Random) -> None:
    text = chance.choice(
        ["", "[]", '{"sharded_backend": "zarr"}', '{"sharded_backend": 1}', "{" * 9999, '{"a":1,"a":2}']
    )
    (folder / "release" / "metadata.json").write_text(text)


def facts_are_wrong(folder: Path, chance: random.Random) -> None:
    def edit(facts: dict) -> None:
        name = chance.choice(sorted(facts["tensors"]))
        fact = facts["tensors"][name]
        changes = [["../x.safetensors", *fact[1:]], ["x.bin", *fact[1:]], 7, [fact[0]], [fact[0], "x", []]]
        facts["tensors"][name] = chance.choice(changes)

    edit_json(folder / "hf" / "vlbridge.json", edit)


MEGATRON = [
    *(hostile_pickle, hostile_tensor, chunk_elsewhere, chunks_swapped, entry_renamed, entry_lost),
    *(entry_is_wrong, tracker_is_wrong, format_is_wrong, facts_are_wrong),
]

CASES = [*(("hf", damage) for damage in [*ANY, *HF]), *(("megatron", damage) for damage in [*ANY, *MEGATRON])]


@pytest.mark.parametrize(("kind", "damage"), CASES, ids=[f"{kind}-{damage.__name__}" for kind, damage in CASES])
def test_damage_is_refused_by_name_or_changes_nothing(kind, damage, sound, tmp_path):
    check(kind, damage, sound / kind, sound / "hf", tmp_path)


def make_damaged(kind: str, damage: Damage, number: int, folder: Path, damaged: Path) -> None:
    """A damaged copy, the same whenever it is made."""
    shutil.copytree(folder, damaged)
    damage(damaged, random.Random(f"{SEED} {kind} {damage.__name__} {number}"))


def check(kind: str, damage: Damage, folder: Path, sound: Path, tmp_path: Path) -> None:
    """Damage copies of `folder`; what is made from one is refused by name, or holds the weights of `sound`."""
    refused = 0
    for number in range(ROUNDS):
        damaged, target = tmp_path / f"damaged-{number}", tmp_path / f"made-{number}"
        make_damaged(kind, damage, number, folder, damaged)
        message = convert(kind, damaged, target)
        assert not (damaged / "hostile-was-here").exists()
        assert damaged.is_dir()
        if message is None:
            assert verify(target, sound).equal, f"round {number}: a silent change"
        else:
            refused += 1
            assert damaged.name in message, f"round {number}: {message}"
            assert not target.exists()
    assert refused, "this damage was never found"


def convert(kind: str, folder: Path, target: Path) -> str | None:
    """The message of the refusal. Any other error than that ends the test."""
    try:
        (export_checkpoint if kind == "megatron" else import_checkpoint)(folder, target)
    except VLBridgeError as error:
        return str(error)
    return None
