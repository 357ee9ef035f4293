"""`torch_dist` folders: any grid of chunks, layers stacked or not; damage and hostility are refused."""

import io
import itertools
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections import OrderedDict
from pathlib import Path, PosixPath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.serialization import _get_layout
from torch.utils.serialization import config as serialization

from megatron_vlbridge.checkpoint.convert import export_checkpoint
from megatron_vlbridge.checkpoint.formats import locate
from megatron_vlbridge.checkpoint.inspect import inspect
from megatron_vlbridge.checkpoint.stream.engine import Block
from megatron_vlbridge.checkpoint.torch_dist.metadata import read_metadata
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder, _SafeReader
from megatron_vlbridge.checkpoint.torch_dist.writer import ReleaseWriter
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, TensorSpec
from tests.unit.time_limit import limit

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Grid(DefaultSavePlanner):
    """Writes tensors cut at the given places along each dim."""

    def __init__(self, tensors, cuts):
        super().__init__()
        self.tensors, self.cuts = tensors, cuts

    def create_local_plan(self):
        items = []
        for name, tensor in self.tensors.items():
            for offset, size in boxes(tensor.shape, self.cuts.get(name, ())):
                chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
                data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.shape)
                index = MetadataIndex(name, offset)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, item):
        chunk = item.tensor_data.chunk
        region = Region(item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes))
        return self.tensors[item.index.fqn][region.slices]


def boxes(shape, cuts):
    result = [((), ())]
    for dim, extent in enumerate(shape):
        edges = [0, *sorted(cuts[dim] if dim < len(cuts) else ()), extent]
        spans = [(start, end - start) for start, end in itertools.pairwise(edges) if end > start]
        result = [((*offset, start), (*size, length)) for offset, size in result for start, length in spans]
    return result


def write(folder: Path, tensors, cuts=None) -> Path:
    save({}, storage_writer=FileSystemWriter(folder), planner=Grid(tensors, cuts or {}), no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


def write_release(folder: Path, specs, fill) -> None:
    writer = ReleaseWriter(specs, fill)
    writer.prepare(folder)
    block = Block(writer.block_bytes, threading.Event())
    writer.finish(folder, [writer.write(number, folder, block) for number in range(len(writer.sizes))])


def some(*shape, dtype=torch.int32):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_region_of_every_grid_is_the_slice(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cuts = [data.draw(st.sets(st.integers(1, extent), max_size=2)) for extent in shape]
    folder = write(tmp_path_factory.mktemp("grid"), {"x": some(*shape)}, {"x": cuts})
    reader = TorchDistFolder(folder)
    assert reader.table == {"x": TensorSpec(shape, torch.int32)}
    for _ in range(3):
        offset = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
        size = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
        region = Region("x", offset, size)
        assert torch.equal(reader.read(region), some(*shape)[region.slices])


def test_layers_stored_one_by_one_are_read_as_a_stack(tmp_path):
    stacked = some(3, 4, 2)
    folder = write(tmp_path, {f"m.layers.{i}.w": stacked[i] for i in range(3)}, {"m.layers.1.w": [{2}]})
    reader = TorchDistFolder(folder)
    assert reader.table == {"m.layers.w": TensorSpec((3, 4, 2), torch.int32)}
    region = Region("m.layers.w", (1, 1, 0), (2, 3, 1))
    assert torch.equal(reader.read(region), stacked[region.slices])


def test_a_tensor_that_was_saved_transposed_is_read_right(tmp_path):
    """DCP keeps the strides of what it is given."""
    tensor = some(5, 3).t()
    reader = TorchDistFolder(write(tmp_path, {"x": tensor}))
    assert torch.equal(reader.read(Region("x", (1, 2), (2, 3))), tensor[1:, 2:])


def test_chunks_that_differ_in_their_numbers_alone_are_found_without_torch(tmp_path, monkeypatch):
    """Layers are alike around their numbers where the writer leaves torch's checksums out; strides differ there."""
    specs = {f"w{i}": TensorSpec((6, 6), torch.int32) for i in range(9)}
    write_release(tmp_path, specs, lambda region, out: out.copy_(some(6, 6) + int(region.name[1:])))
    asked = []
    find = _SafeReader.find
    monkeypatch.setattr(_SafeReader, "find", lambda reader, index: (asked.append(index), find(reader, index))[1])
    reader = TorchDistFolder(tmp_path)
    for i in range(9):
        assert torch.equal(reader.read(Region.whole(f"w{i}", (6, 6))), some(6, 6) + i)
    assert len(asked) == 1
    with serialization.patch({"save.compute_crc32": False}):
        turned = write(tmp_path / "turned", {"a": some(6, 6), "b": some(6, 6).t(), "c": some(6, 6) + 1})
    reader = TorchDistFolder(turned)
    for name, expected in {"a": some(6, 6), "b": some(6, 6).t(), "c": some(6, 6) + 1}.items():
        assert torch.equal(reader.read(Region.whole(name, (6, 6))), expected)
    assert len(asked) > 2


def test_optimizer_state_is_passed_over(tmp_path):
    tensors = {"w": some(2), "optimizer.state.exp_avg.w": some(2), "chained_1.optimizer.state.exp_avg.w": some(2)}
    assert TorchDistFolder(write(tmp_path, tensors)).table.keys() == {"w"}


def test_what_is_written_is_what_torch_reads(tmp_path):
    """Read back by torch's own converter: tensors, and the entries that Megatron's loader asks for."""
    tensors = {
        "m.decoder.layers.self_attention.linear_qkv.weight": some(3, 4, 2, dtype=torch.bfloat16),
        "m.decoder.layers.self_attention.linear_qkv.bias": some(3, 4, dtype=torch.float32),
        "m.norm.weight": some(5, dtype=torch.float32),
    }
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_release(tmp_path, specs, lambda region, out: out.copy_(tensors[region.name][region.slices]))
    dcp_to_torch_save(tmp_path / "release", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=False)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    common = found["common_state/shard_0_1"][0]
    assert common["checkpoint_version"] == 3.0
    extra = {f"m.decoder.layers.self_attention.linear_qkv._extra_state/shard_{layer}_3" for layer in range(3)}
    extra.add("m.norm._extra_state/shard_0_1")
    assert found.keys() == tensors.keys() | {"common_state/shard_0_1"} | extra
    assert all(found[name][0].numel() == 0 for name in extra)
    assert locate(tmp_path) == tmp_path / "release"
    reader = TorchDistFolder(tmp_path)
    assert reader.table == specs
    assert all(torch.equal(reader.read(Region.whole(name, specs[name].shape)), tensors[name]) for name in specs)


def test_large_tensors_are_written_in_blocks(tmp_path):
    shape = (1, 300, 2**17)  # 75 MiB of int16, 256 KiB a row
    asked = []

    def fill(region, out):
        asked.append(region)
        assert out.shape == region.shape

    write_release(tmp_path, {"m.layers.w": TensorSpec(shape, torch.int16)}, fill)
    assert [region.shape for region in asked] == [(1, 256, 2**17), (1, 44, 2**17)]


@pytest.mark.parametrize(("text", "name"), [("release", "release"), ("12\n", "iter_0000012")])
def test_the_tracker_names_the_iteration(text, name, tmp_path):
    write(tmp_path / name, {"w": some(2)})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert locate(tmp_path) == tmp_path / name
    assert locate(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("text", ["", "../x", "-1", "13", "release 1"])
def test_a_tracker_that_names_nothing_is_refused(text, tmp_path):
    write(tmp_path / "iter_0000012", {"w": some(2)})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(VLBridgeError, match="latest_checkpointed_iteration"):
        locate(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(VLBridgeError, match="neither"):
        TorchDistFolder(tmp_path)


@pytest.mark.parametrize("ranks", [["mp_rank_00"], ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000"]])
def test_the_format_torch_is_named_with_how_to_convert_it(ranks, tmp_path):
    """As Megatron saves it: a folder for each tensor- and pipeline-parallel rank."""
    for rank in ranks:
        (tmp_path / "run" / "iter_0000002" / rank).mkdir(parents=True)
        (tmp_path / "run" / "iter_0000002" / rank / "model_optim_rng.pt").touch()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    for place in (tmp_path / "run", tmp_path / "run" / "iter_0000002"):
        for use in (TorchDistFolder, inspect, lambda folder: export_checkpoint(folder, tmp_path / "new")):
            with pytest.raises(VLBridgeError, match=r"found mp_rank_00.* --ckpt-convert-format torch_dist"):
                use(place)


def test_other_formats_of_dcp_are_named(tmp_path):
    """torch_dcp and fsdp_dtensor: DCP's files without Megatron's metadata.json."""
    folder = write(tmp_path, {"w": some(2)})
    (folder / "metadata.json").unlink()
    with pytest.raises(VLBridgeError, match=r"without metadata\.json.*torch_dcp and fsdp_dtensor.*torch_dist"):
        TorchDistFolder(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"sharded_backend": "zarr"}', None])
def test_another_format_is_refused(text, tmp_path):
    folder = write(tmp_path, {"w": some(2)})
    if text is None:
        (folder / "metadata.json").unlink()
    else:
        (folder / "metadata.json").write_text(text)
    with pytest.raises(VLBridgeError, match=r"metadata\.json"):
        TorchDistFolder(folder)


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch hostile-was-here",)),
        (eval, ("open('hostile-was-here', 'w')",)),
        (io.open, ("hostile-was-here", "w")),
        (torch.load, ("hostile-was-here",)),
        (exec, ("open('hostile-was-here', 'w')",)),
    ],
    ids=lambda call: call[0].__name__,
)
def test_a_hostile_pickle_runs_nothing(call, tmp_path, monkeypatch):
    folder = write(tmp_path / "checkpoint", {"w": some(2)})
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(*call)))
    with pytest.raises(VLBridgeError, match="it asks for"):
        TorchDistFolder(folder)
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({}), pickle.dumps([1, 2])])
def test_metadata_that_is_none_is_refused(content, tmp_path):
    folder = write(tmp_path, {"w": some(2)})
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(VLBridgeError, match=r"\.metadata"):
        TorchDistFolder(folder)


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


PATH, PLAIN = named("pathlib", "PosixPath"), named("collections", "OrderedDict")
ENUM = named("torch.distributed.checkpoint.planner", "WriteItemType")
LAYOUT = named("torch.serialization", "_get_layout")
RECORD = named("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata")
SIZE = named("torch", "Size")
STATE = b"}" + text("is_symlink") + PLAIN + b"s"
MEMBER = ENUM + b"K\1\x85R"


@pytest.mark.parametrize(
    "content",
    {
        "class": PATH + b"N" + STATE + b"\x86b",
        "class-of-records": RECORD + b"N" + STATE + b"\x86b",
        "class-by-dict": PLAIN + STATE + b"b",
        "enum": ENUM + b"N" + STATE + b"\x86b",
        "member-of-enum": MEMBER + STATE + b"b",
        "function": LAYOUT + STATE + b"b",
        "dtype": named("torch", "float32") + STATE + b"b",
        "record-by-slots": RECORD + b")\x81N" + STATE + b"\x86b",
        "item-of-a-class": PATH + text("is_symlink") + PLAIN + b"s",
        "call-of-a-class": RECORD + b")R",
        "call-of-an-enum": ENUM + text("New") + text("a b") + b"\x86R",
        "new-enum": ENUM + b")\x81",
        "new-class-of-a-class": SIZE + b")\x81",
        "old-instance": b"(" + PATH + b"o",
        "extension": b"\x82\1",
        "persistent": text("x") + b"Q",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_hostile_pickle_changes_no_class(content, tmp_path):
    folder = write(tmp_path, {"w": some(2)})
    shared = (PosixPath, OrderedDict, WriteItemType, WriteItemType.SHARD, _get_layout, ChunkStorageMetadata)
    before = [dict(vars(thing)) for thing in shared]
    (folder / ".metadata").write_bytes(b"\x80\4" + content[1] + b".")
    with pytest.raises(VLBridgeError, match=r"\.metadata: .*no checkpoint needs"):
        TorchDistFolder(folder)
    assert [dict(vars(thing)) for thing in shared] == before


NESTED = b")" + b"\x85" * 300_000


def doubled(levels: int) -> bytes:
    """A tuple that holds one tuple twice, and so on: five bytes a level, 2 ** levels parts."""
    return b")q\0" + b"".join(b"h%c\x86q%c" % (level, level + 1) for level in range(levels))


@pytest.mark.parametrize(
    "content",
    {
        "deep-key": b"}" + NESTED + b"K\1s",
        "doubled-key": b"}" + doubled(60) + b"K\1s",
        "doubled-index": b"}"
        + named("torch.distributed.checkpoint.metadata", "MetadataIndex")
        + (b")\x81}(" + text("fqn") + doubled(60) + text("offset") + b"NubK\1s"),
        "deep-argument": ENUM + NESTED + b"\x85R",
        "deep-class": NESTED + b")R",
        "bytes": b"\x8e" + struct.pack("<Q", 2**62),
        "more-bytes": b"\x8e" + struct.pack("<Q", 2**63 + 1),
        "text": b"\x8d" + struct.pack("<Q", 2**62),
        "bytearray": b"\x96" + struct.pack("<Q", 2**30),
        "huge-bytearray": b"\x96" + struct.pack("<Q", 2**62),
        "memo": b"Nr" + struct.pack("<I", 2**26),
        "long-integer": b"\x8b" + struct.pack("<i", 2**31 - 1),
        "frame": b"\x95" + struct.pack("<Q", 2**62),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_hostile_pickle_takes_neither_memory_nor_time(content, tmp_path):
    folder = write(tmp_path, {"w": some(2)})
    (folder / ".metadata").write_bytes(b"\x80\4" + content[1] + b".")
    tracemalloc.start()
    try:
        with limit(), pytest.raises(VLBridgeError, match=r"\.metadata: .*found:? \S"):
            TorchDistFolder(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


STANDARD = """
import pickle, sys, tracemalloc
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from megatron_vlbridge.checkpoint.torch_dist.metadata import _Unpickler
class Standard(pickle.Unpickler):
    find_class = _Unpickler.find_class
tracemalloc.start()
Standard(sys.stdin.buffer).load()
print(hasattr(ChunkStorageMetadata, "is_symlink"), tracemalloc.get_traced_memory()[1] > 2**30)
"""
STATE_OF_A_CLASS = b"N" + STATE + b"\x86b"


@pytest.mark.parametrize(
    ("content", "status", "output"),
    [
        (b"}" + NESTED + b"K\1s", -signal.SIGSEGV, ""),
        (RECORD + STATE_OF_A_CLASS, 0, "True False"),
        (b"Nr" + struct.pack("<I", 2**27), 0, "False True"),
    ],
    ids=["deep-key", "class", "memo"],
)
@pytest.mark.layouts
def test_a_restricted_find_class_is_not_enough(content, status, output):
    """Python's own unpickler, with the `find_class` of ours: it dies, changes a class, or takes gigabytes."""
    done = subprocess.run([sys.executable, "-c", STANDARD], input=b"\x80\4" + content + b".", capture_output=True)
    assert (done.returncode, done.stdout.decode().strip()) == (status, output), done.stderr


@pytest.mark.parametrize("where", ["size", "chunks", "properties"])
def test_an_entry_that_doubles_itself_is_refused_in_few_words(where, tmp_path):
    value: object = ()
    for _ in range(60):
        value = [value, value]
    folder = write(tmp_path, {"w": some(2)})
    edit(folder, lambda metadata: setattr(metadata.state_dict_metadata["w"], where, value))
    with limit(), pytest.raises(VLBridgeError, match=r"\.metadata: w: ") as caught:
        TorchDistFolder(folder)
    assert len(str(caught.value)) < 1000


def test_metadata_with_changed_bytes_is_refused_or_means_as_much(tmp_path):
    """A name, or which of two places is whose, is known from the pickle alone."""
    folder = write(tmp_path, {"a.w": some(2, 3), "b.w": some(4)}, {"a.w": [{1}]})
    sound = (folder / ".metadata").read_bytes()
    messages = []
    for seed in range(500):
        chance, content = random.Random(seed), bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        (folder / ".metadata").write_bytes(content)
        try:
            reader = TorchDistFolder(folder)
            read = [reader.read(Region.whole(name, spec.shape)) for name, spec in reader.table.items()]
        except VLBridgeError as error:
            messages.append(str(error))
        else:
            assert {tuple(found.shape) for found in read} <= {(2, 3), (4,)}, seed
    assert 100 < len(messages) < 500
    assert all(str(folder) in message for message in messages)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_metadata_of_another_python_is_read(module, tmp_path):
    """Python 3.13 has the class of paths in another module than 3.12."""
    folder = write(tmp_path, {"w": some(2)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    content = pickle.dumps(metadata, protocol=2)
    own = f"c{PosixPath.__module__}\nPosixPath\n".encode()
    assert content.count(own) == 1
    (folder / ".metadata").write_bytes(content.replace(own, f"c{module}\nPosixPath\n".encode()))
    assert torch.equal(TorchDistFolder(folder).read(Region.whole("w", (2,))), some(2))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_writes_is_read_as_pickle_reads_it(protocol, tmp_path):
    folder = write(tmp_path, {"m.w": some(4, 3), "b": some(2, dtype=torch.bfloat16)}, {"m.w": [{2}]})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {
        "m.w": ("m", "w", 0),
        "more": OrderedDict(layer=["x" if protocol == 2 else b"x", 2.5, 2**40, True, None, torch.strided]),
    }
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    assert read_metadata(folder / ".metadata") == metadata


def edit(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def drop_chunk(metadata):
    metadata.state_dict_metadata["w"].chunks.pop()


def double_chunk(metadata):
    metadata.state_dict_metadata["w"].chunks.append(metadata.state_dict_metadata["w"].chunks[0])


def grow_tensor(metadata):
    metadata.state_dict_metadata["w"].size = torch.Size([4, 5])


def move_chunk(metadata):
    metadata.state_dict_metadata["w"].chunks[1].offsets = torch.Size([1, 0])


def forget_storage(metadata):
    del metadata.storage_data[MetadataIndex("w", (2, 0))]


def storage(metadata):
    return metadata.storage_data[MetadataIndex("w", (2, 0))]


def escape(metadata):
    storage(metadata).relative_path = "../elsewhere.distcp"


def absolute(metadata):
    storage(metadata).relative_path = "/etc/passwd"


def lose_file(metadata):
    storage(metadata).relative_path = "__9_9.distcp"


def shorten(metadata):
    storage(metadata).length = 3


def shift(metadata):
    storage(metadata).offset = 10**9


def negative(metadata):
    storage(metadata).offset = -1


@pytest.mark.parametrize(
    "change",
    [
        drop_chunk,
        double_chunk,
        grow_tensor,
        move_chunk,
        forget_storage,
        escape,
        absolute,
        lose_file,
        shorten,
        shift,
        negative,
    ],
)
def test_metadata_that_does_not_fit_its_files_is_refused(change, tmp_path):
    folder = write(tmp_path, {"w": some(4, 3)}, {"w": [{2}]})
    TorchDistFolder(folder)
    edit(folder, change)
    with pytest.raises(VLBridgeError, match="w"):
        TorchDistFolder(folder)


class Beyond:
    """Pickled as a tensor that begins 1,000 values after the start of its storage, which holds four."""

    def __reduce__(self):
        storage = torch.storage.TypedStorage(wrap_storage=some(4).untyped_storage(), dtype=torch.int32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 1000, (4,), (1,), False, OrderedDict())


def test_a_tensor_that_reaches_beyond_its_chunk_is_refused(tmp_path):
    """Its values would be those of another tensor in the same file."""
    folder = write(tmp_path, {"w": some(4)})
    stream = io.BytesIO()
    torch.save(Beyond(), stream)
    length = stream.tell()
    (folder / "__0_0.distcp").write_bytes(stream.getvalue() + bytes(8000))
    edit(folder, lambda metadata: vars(metadata.storage_data[MetadataIndex("w", (0,))]).update(offset=0, length=length))
    with pytest.raises(VLBridgeError, match="outside of the chunk"):
        TorchDistFolder(folder).read(Region.whole("w", (4,)))


def test_a_truncated_file_is_refused_by_name(tmp_path):
    folder = write(tmp_path, {"w": some(4, 3)})
    os.truncate(folder / "__0_0.distcp", 100)
    with pytest.raises(VLBridgeError, match=r"__0_0\.distcp.*truncated"):
        TorchDistFolder(folder)


def test_overwritten_bytes_are_refused_when_read(tmp_path):
    folder = write(tmp_path, {"w": some(4, 3)})
    content = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(b"\0" * len(content))
    with pytest.raises(VLBridgeError, match=r"__0_0\.distcp: expected the values of w"):
        TorchDistFolder(folder).read(Region.whole("w", (4, 3)))


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_a_chunk_that_is_damaged_around_its_numbers_is_refused_beside_a_sound_one(behind, tmp_path):
    specs = {name: TensorSpec((6, 6), torch.int32) for name in "ab"}
    write_release(tmp_path, specs, lambda _region, out: out.copy_(some(6, 6)))
    file = tmp_path / "release" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    numbers = content.rindex(some(6, 6).numpy().tobytes())
    place = slice(numbers + 144, None) if behind else slice(numbers - 400, numbers)
    content[place] = bytes(len(content[place]))
    file.write_bytes(content)
    reader = TorchDistFolder(tmp_path)
    assert torch.equal(reader.read(Region.whole("a", (6, 6))), some(6, 6))
    with pytest.raises(VLBridgeError, match=r"__0_0\.distcp: expected the values of b"):
        reader.read(Region.whole("b", (6, 6)))


def test_layers_of_several_dtypes_are_refused(tmp_path):
    folder = write(tmp_path, {"m.layers.0.w": some(2), "m.layers.1.w": some(2, dtype=torch.int8)})
    with pytest.raises(VLBridgeError, match="one dtype"):
        TorchDistFolder(folder)


def test_a_missing_layer_is_refused(tmp_path):
    folder = write(tmp_path, {"m.layers.0.w": some(2), "m.layers.2.w": some(2)})
    with pytest.raises(VLBridgeError, match=r"m\.layers\.w"):
        TorchDistFolder(folder)
