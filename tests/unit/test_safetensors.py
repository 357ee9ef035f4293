"""Folders of safetensors: read and written as the format's own library does; damage and hostility are refused."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_vlbridge.checkpoint.hf import writer as hf_writer
from megatron_vlbridge.checkpoint.hf.header import encode_header
from megatron_vlbridge.checkpoint.hf.reader import INDEX, SafetensorsFolder
from megatron_vlbridge.checkpoint.hf.writer import SafetensorsWriter, plan_shards
from megatron_vlbridge.checkpoint.stream.engine import Block
from megatron_vlbridge.checkpoint.stream.parts import row_blocks
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, TensorSpec

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "b": torch.arange(10, dtype=torch.bfloat16),
    "c": torch.arange(6, dtype=torch.int64).reshape(3, 2),
}


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    found = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": found if weight_map is None else weight_map}))
    return folder


def two_shards(folder: Path, **changes) -> Path:
    shards = {"x-1.safetensors": {"a": TENSORS["a"]}, "x-2.safetensors": {"b": TENSORS["b"], "c": TENSORS["c"]}}
    weight_map = {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"} | changes
    return write_shards(folder, shards, {name: file for name, file in weight_map.items() if file is not None})


def test_shards_are_found_through_the_index_alone(tmp_path):
    folder = SafetensorsFolder(two_shards(tmp_path))
    assert folder.table == {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    assert folder.files == {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"}


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors-00001-of-00001.safetensors"])
def test_one_file_needs_no_index(file, tmp_path):
    save_file(TENSORS, tmp_path / file)
    folder = SafetensorsFolder(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.read(Region.whole(name, tuple(tensor.shape))), tensor)


def test_a_shard_that_is_a_symlink_is_followed(tmp_path):
    folder = two_shards(tmp_path / "folder")
    blob = tmp_path / "blob"
    (folder / "x-1.safetensors").rename(blob)
    (folder / "x-1.safetensors").symlink_to(blob)
    assert torch.equal(SafetensorsFolder(folder).read(Region.whole("a", (2, 3, 4))), TENSORS["a"])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_region_is_the_slice(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    folder = tmp_path_factory.mktemp("regions")
    save_file({"x": tensor}, folder / "model.safetensors")
    offset = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    size = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    region = Region("x", offset, size)
    assert torch.equal(SafetensorsFolder(folder).read(region), tensor[region.slices])


def write_folder(folder: Path, specs, files, fill) -> None:
    writer = SafetensorsWriter(specs, files, fill)
    writer.prepare(folder)
    block = Block(writer.block_bytes, threading.Event())
    writer.finish(folder, [writer.write(number, folder, block) for number in range(len(writer.sizes))])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_what_is_written_is_what_the_library_reads(tmp_path_factory, dtypes, limit):
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"t{i}": torch.arange(4 * i + 4).reshape(2, -1).to(dtype) for i, dtype in enumerate(dtypes)}
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    fill = lambda region, out: out.copy_(tensors[region.name][region.slices])  # noqa: E731
    write_folder(folder, specs, plan_shards(specs, limit), fill)
    read = {}
    for file in folder.glob("*.safetensors"):
        part = load_file(file)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit
        read |= part
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert SafetensorsFolder(folder).table == specs


def test_neighbouring_parts_lie_in_different_files(monkeypatch):
    monkeypatch.setattr(hf_writer, "PART_BYTES", 30)
    specs = {name: TensorSpec((10,), torch.int8) for name in "abcdefghi"}
    files = dict(zip(specs, "xxxxxxyyz", strict=True))
    writer = SafetensorsWriter(specs, files, lambda _region, _out: None)
    parts = writer.regions
    assert [{files[region.name] for region in part} for part in parts] == [{"x"}, {"y"}, {"z"}, {"x"}]
    assert sorted(region.name for part in parts for region in part) == list(specs)


def test_shards_are_named_as_on_the_hub():
    specs = {name: TensorSpec((10,), torch.int8) for name in "abcde"}
    assert plan_shards(specs, 1000) == dict.fromkeys("abcde", "model.safetensors")
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert plan_shards(specs, 30) == {"a": one, "b": one, "c": one, "d": two, "e": two}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 40), st.data())
def test_row_blocks_tile_the_region_within_the_limit(shape, limit, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    whole = torch.zeros(shape, dtype=torch.int8)
    for block in row_blocks(Region.whole("x", tuple(shape)), 1, limit, dim):
        assert block.volume <= limit or block.shape[dim] == 1
        whole[block.slices] += 1
    assert bool((whole == 1).all())


def damage_truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def damage_header_length(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_header(**changes):
    def damage(path: Path) -> None:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        for key, value in changes.items():
            header["a"][key] = value
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return damage


def damage_text(old: bytes, new: bytes):
    def damage(path: Path) -> None:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncated, "truncated"),
        (damage_longer, "truncated or damaged"),
        (damage_header_length, "header that fits"),
        (damage_empty, "header that fits"),
        (damage_header(dtype="F99"), "dtype"),
        (damage_header(shape=[2, 3, 5]), "bytes for"),
        (damage_header(shape=[-2, -3, 4]), "shape"),
        (damage_header(shape=[True, 6, 4]), "shape"),
        (damage_header(data_offsets=[8, 104]), "at byte 0"),
        (damage_header(data_offsets=[0]), "offsets"),
        (damage_text(b'"dtype"', b'"shape"'), "twice"),
        (damage_text(b'{"', b'["'), "JSON"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(damage, reason, tmp_path):
    folder = two_shards(tmp_path)
    damage(folder / "x-1.safetensors")
    with pytest.raises(VLBridgeError, match=reason) as caught:
        SafetensorsFolder(folder)
    assert "x-1.safetensors" in str(caught.value)


@pytest.mark.parametrize("shape", [[0, 2**63], [0] * 65, [0, 10**4000]], ids=["huge", "deep", "long"])
def test_an_empty_tensor_of_a_shape_that_none_can_have_is_refused(shape, tmp_path):
    text = json.dumps({"a": {"dtype": "I8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(VLBridgeError, match=r"model\.safetensors: a: expected a shape"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["nul\0", "escape\x1b[2J", "c1\x9b", "half\ud800", "line\n"])
def test_a_name_that_cannot_be_printed_is_refused_in_printable_words(name, tmp_path):
    text = json.dumps({name: {"dtype": "I8", "shape": [], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    with pytest.raises(VLBridgeError, match="printable names") as caught:
        SafetensorsFolder(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["größe.weight", "层.weight", "a b", ""])
def test_other_names_are_read(name, tmp_path):
    save_file({name: TENSORS["b"]}, tmp_path / "model.safetensors")
    assert SafetensorsFolder(tmp_path).table.keys() == {name}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"a": "x-3.safetensors"}, "no such file"),
        ({"d": "x-1.safetensors"}, "expected tensor d"),
        ({"c": None}, "found c"),
        ({"b": "x-1.safetensors"}, "only in x-1"),
        ({"a": "../x-1.safetensors"}, "in this folder"),
        ({"a": "/etc/x-1.safetensors"}, "in this folder"),
        ({"a": "sub/../../x-1.safetensors"}, "in this folder"),
        ({"a": "sub//x-1.safetensors"}, "in this folder"),
        ({"a": "weights.bin"}, "safetensors file"),
        ({"a": 7}, "safetensors file"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(changes, reason, tmp_path):
    with pytest.raises(VLBridgeError, match=reason) as caught:
        SafetensorsFolder(two_shards(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "x", "a": "y"}}'])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    folder = two_shards(tmp_path)
    (folder / INDEX).write_text(text)
    with pytest.raises(VLBridgeError, match="index"):
        SafetensorsFolder(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards = {
        "1.safetensors": {"a": TENSORS["a"], "c": TENSORS["c"]},
        "2.safetensors": {"a": TENSORS["a"], "b": TENSORS["b"]},
    }
    with pytest.raises(VLBridgeError, match=r"expected a only in 2\.safetensors"):
        SafetensorsFolder(write_shards(tmp_path, shards))


@pytest.mark.parametrize("files", [[], ["one.safetensors", "two.safetensors"]])
def test_a_folder_without_an_index_and_not_one_file_is_refused(files, tmp_path):
    for file in files:
        save_file({"a": TENSORS["a"]}, tmp_path / file)
    with pytest.raises(VLBridgeError, match="expected model"):
        SafetensorsFolder(tmp_path)


def test_the_data_begins_at_a_multiple_of_8():
    """As the format's library lays it out, so that memory-mapped tensors are aligned."""
    for length in range(1, 20):
        content = encode_header({"x" * length: TensorSpec((3,), torch.float64)})
        assert len(content) % 8 == 0
        assert int.from_bytes(content[:8], "little") == len(content) - 8
