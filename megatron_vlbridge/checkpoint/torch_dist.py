"""Megatron's `torch_dist` checkpoints: read and written region by region, through torch's distributed checkpoint (DCP).

A folder holds DCP's `.metadata` (a pickle) and `*.distcp` files, and Megatron's `metadata.json`. The pickle comes from
strangers and is read by an unpickler that knows only the classes a checkpoint needs.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_vlbridge.checkpoint.safetensors import load_json_object, row_blocks
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, TensorSpec, stack_layers
from megatron_vlbridge.weights.regions import RegionIndex, Shape, check_exact_cover

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = "metadata.json"
CACHE_BYTES = 256 * 2**20

_NO_WEIGHT = re.compile(r"^(optimizer|chained_\d+)\.")
_PLAIN_NAMES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}
# Megatron-Core before 0.16 pickled its own subclasses; their state is that of the base classes.
_OLD_NAMES = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): SavePlan,
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and torch's dtypes; anything else ends the reading."""

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if (module, name) in _OLD_NAMES:
            return _OLD_NAMES[module, name]
        if (module, name) not in _PLAIN_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _SafeReader(FileSystemReader):
    """DCP's own reader, except that it does not run what the metadata file says."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except OSError as error:
            raise VLBridgeError(f"{path}: expected a readable file, found: {error}. Copy the folder again.") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise VLBridgeError(
                f"{path}: expected DCP's metadata, found: {error}. Do not trust this folder."
            ) from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise VLBridgeError(f"{path}: expected DCP's metadata, found {type(metadata).__name__}.")
        return metadata


class _ReadOne(DefaultLoadPlanner):
    """Puts the one chunk that is asked for into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, _read_item: ReadItem) -> torch.Tensor:
        return self.target

    def commit_tensor(self, _read_item: ReadItem, _tensor: torch.Tensor) -> None:
        pass


def locate(folder: str | Path) -> Path:
    """The folder of one saved iteration: `folder` itself, or the one that its tracker file names."""
    folder = Path(folder)
    if (folder / ".metadata").is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise VLBridgeError(
            f"{folder}: expected a torch_dist checkpoint (.metadata) or {TRACKER}, found neither. "
            "Give the folder that Megatron saved to, or one iteration in it."
        )
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise VLBridgeError(f"{tracker}: expected an iteration or 'release', found {text!r:.60}. Name one by hand.")
    found = folder / ("release" if text == "release" else f"iter_{int(text):07}")
    if not (found / ".metadata").is_file():
        raise VLBridgeError(f"{tracker}: it names {found.name}, expected .metadata there, found none. Copy it again.")
    return found


class TorchDistFolder:
    """The weights of a `torch_dist` checkpoint; optimizer state and other entries are passed over.

    `table` maps canonical names (layers stacked, whether stored stacked or one by one) to shape and dtype. `folder` is
    the iteration's folder. Opening reads metadata only.

    Raises VLBridgeError, naming file and tensor, for a folder that is none, metadata that asks for foreign classes, a
    file that is missing or truncated, and chunks that leave gaps or overlap.

    Example: `TorchDistFolder("run").read(Region("language_model.decoder.final_layernorm.weight", (0,), (8,)))`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = locate(folder)
        form = load_json_object(self.folder / FORMAT)
        if form.get("sharded_backend") != "torch_dist":
            found = form.get("sharded_backend")
            raise VLBridgeError(f"{self.folder / FORMAT}: sharded_backend: expected torch_dist, found {found!r}.")
        self._reader = _SafeReader(self.folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._chunks: dict[str, _Chunk] = {}
        stored = self._stored_tensors(metadata)
        self._index = RegionIndex(
            (stack_layers(Region(chunk.name, chunk.offset, chunk.shape)), Region.whole(key, chunk.shape))
            for key, chunk in self._chunks.items()
        )
        self.table = self._make_table(stored)
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    def read(self, region: Region) -> torch.Tensor:
        """The numbers of a region, whatever the grid of chunks. Chunks are kept (256 MiB) for the next regions."""
        result = torch.empty(region.shape, dtype=self.table[region.name].dtype)
        for piece in self._index.pieces(region):
            part = self._load(piece.source.name)[piece.source.slices]
            result[piece.target.slices] = part.reshape(piece.target.shape)
        return result

    def _load(self, key: str) -> torch.Tensor:
        """One stored chunk."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        chunk = self._chunks[key]
        target = torch.empty(chunk.shape, dtype=chunk.dtype)
        index = MetadataIndex(chunk.name, chunk.offset)
        corner, size = torch.Size([0] * len(chunk.shape)), torch.Size(chunk.shape)
        item = ReadItem(LoadItemType.TENSOR, index, corner, index, corner, size)
        try:
            self._reader.read_data(LoadPlan([item]), _ReadOne(target)).wait()
        except (RuntimeError, AssertionError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
            text = f"expected the numbers of {chunk.name} at {list(chunk.offset)}, found: {error}"
            raise VLBridgeError(f"{self.folder / chunk.file}: {text}. Copy the file again.") from error
        self._cache[key] = target
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return target

    def _error(self, name: str, text: str) -> VLBridgeError:
        return VLBridgeError(f"{self.folder / '.metadata'}: {name}: {text}. The folder is damaged: copy it again.")

    def _stored_tensors(self, metadata: Metadata) -> dict[str, TensorSpec]:
        """The weights by their stored names; notes their chunks after checking each against its file."""
        stored = {}
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or _NO_WEIGHT.match(name):
                continue
            if not _are_sizes(entry.size) or not isinstance(entry.properties.dtype, torch.dtype):
                raise self._error(name, f"expected a shape and a dtype, found {entry.size!r:.60}")
            stored[name] = TensorSpec(tuple(entry.size), entry.properties.dtype)
            for chunk in entry.chunks:
                self._note_chunk(name, stored[name], chunk)
        return stored

    def _note_chunk(self, name: str, spec: TensorSpec, chunk: ChunkStorageMetadata) -> None:
        if not all(_are_sizes(value) and len(value) == len(spec.shape) for value in (chunk.offsets, chunk.sizes)):
            raise self._error(name, f"expected chunks of {len(spec.shape)} dims, found {chunk!r:.120}")
        info: Any = self._reader.storage_data.get(MetadataIndex(name, chunk.offsets))
        file = getattr(info, "relative_path", None)
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.distcp", file):
            raise self._error(name, f"expected a .distcp file in the folder for each chunk, found {file!r:.80}")
        noted = _Chunk(name, tuple(chunk.offsets), tuple(chunk.sizes), spec.dtype, file)
        path = self.folder / file
        size = path.stat().st_size if path.is_file() else -1
        if size < 0:
            raise VLBridgeError(f"{path}: expected it to hold {name}, found no such file. Copy the folder again.")
        if not (_are_sizes((info.offset, info.length)) and noted.nbytes <= info.length <= size - info.offset):
            raise VLBridgeError(
                f"{path}: expected {noted.nbytes} bytes of {name} within {info.length} at {info.offset}, "
                f"found a file of {size} bytes. It is truncated: copy it again."
            )
        key = f"{name} {noted.offset}"
        if key in self._chunks:
            raise self._error(name, f"expected one chunk at {list(noted.offset)}, found two")
        self._chunks[key] = noted

    def _make_table(self, stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Canonical tensors with their shapes and dtypes; every number is in one chunk."""
        dtypes: dict[str, set[torch.dtype]] = {}
        shapes = self._index.shapes
        for name, spec in stored.items():
            canonical = stack_layers(Region.whole(name, spec.shape))
            if canonical.name not in shapes or canonical.shape[1:] != shapes[canonical.name][1:]:
                raise self._error(name, f"expected chunks that fill {spec}, found others")
            if canonical.name == name and spec.shape != shapes[name]:
                raise self._error(name, f"expected chunks that fill {spec}, found only {list(shapes[name])}")
            dtypes.setdefault(canonical.name, set()).add(spec.dtype)
        for name, found in dtypes.items():
            if len(found) > 1:
                raise self._error(name, f"expected one dtype in all layers, found {sorted(map(str, found))}")
            try:
                check_exact_cover(name, self._index.regions(name), shapes[name])
            except VLBridgeError as error:
                raise self._error(name, str(error)) from error
        return {name: TensorSpec(shapes[name], found.pop()) for name, found in dtypes.items()}


@dataclass(frozen=True)
class _Chunk:
    """One stored rectangle of a stored tensor."""

    name: str
    offset: Shape
    shape: Shape
    dtype: torch.dtype
    file: str

    @property
    def nbytes(self) -> int:
        return TensorSpec(self.shape, self.dtype).nbytes


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)


class _WriteStreaming(DefaultSavePlanner):
    """Plans the chunks of all tensors up front, and reads the source of each only when DCP is about to write it."""

    def __init__(
        self, specs: Mapping[str, TensorSpec], read: Callable[[Region], torch.Tensor], objects: Mapping[str, object]
    ) -> None:
        super().__init__()
        self.specs, self.source, self.objects = specs, read, objects

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.objects]
        for name, spec in self.specs.items():
            for region in _chunk_grid(name, spec):
                chunk = ChunkStorageMetadata(torch.Size(region.offset), torch.Size(region.shape))
                data = TensorWriteData(chunk, TensorProperties(dtype=spec.dtype), torch.Size(spec.shape))
                items.append(WriteItem(MetadataIndex(name, region.offset), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([self.objects[name]], stream)
            return stream
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        return self.source(Region(name, tuple(chunk.offsets), tuple(chunk.sizes)))


def _chunk_grid(name: str, spec: TensorSpec) -> Iterator[Region]:
    """One chunk per layer of a stacked tensor, and blocks of rows in what is larger than 64 MiB."""
    whole = Region.whole(name, spec.shape)
    if ".layers." not in name:
        yield from row_blocks(whole, spec.dtype.itemsize)
        return
    for layer in row_blocks(whole, spec.dtype.itemsize, block_bytes=1):
        yield from row_blocks(layer, spec.dtype.itemsize, dim=1)


def write_release(folder: Path, specs: Mapping[str, TensorSpec], read: Callable[[Region], torch.Tensor]) -> None:
    """Write a checkpoint that Megatron loads as a release: weights alone, iteration 0, at any parallel layout.

    `read` gives the numbers of a region when they are to be written; one chunk (64 MiB, or one row) is held at a time.
    """
    place = folder / "release"
    place.mkdir()
    planner = _WriteStreaming(specs, read, {**_common_state(), **_extra_states(specs)})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save({}, storage_writer=FileSystemWriter(place), planner=planner, no_dist=True)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise causes[0] from error
    (place / FORMAT).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / TRACKER).write_text("release")


def _common_state() -> dict[str, object]:
    """What Megatron's loader looks for beside the tensors. Version 3 means the order of rows in qkv of the rules."""
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    return {"common_state/shard_0_1": {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}}


def _extra_states(specs: Mapping[str, TensorSpec]) -> dict[str, object]:
    """Transformer Engine's entry for a module without FP8 state, an empty tensor, for each module that may ask for one.

    A model built from Transformer Engine's modules asks for it in Megatron's loader; other models pass it over.
    """
    modules = {name.rpartition(".")[0]: spec.shape[0] if ".layers." in name else None for name, spec in specs.items()}
    nothing = torch.empty(0, dtype=torch.uint8)
    result: dict[str, object] = {}
    for module, layers in modules.items():
        for layer in range(layers or 1):
            result[f"{module}._extra_state/shard_{layer}_{layers or 1}"] = nothing
    return result
