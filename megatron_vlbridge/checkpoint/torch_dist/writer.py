"""Writing a `torch_dist` checkpoint in parts, each as torch's distributed checkpoint (DCP) writes one rank's share."""

import io
import json
import os
import re
from collections.abc import Buffer, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization

from megatron_vlbridge.checkpoint.formats import FORMAT, TRACKER
from megatron_vlbridge.checkpoint.stream.digest import Hasher
from megatron_vlbridge.checkpoint.stream.engine import Block
from megatron_vlbridge.checkpoint.stream.parts import PART_BYTES, Part, group, row_blocks
from megatron_vlbridge.checkpoint.stream.raw import WRITE_BYTES, Filler
from megatron_vlbridge.weights import Region, TensorSpec

_RELEASE = "release"
_STACKED = re.compile(r"\.layers\.(?!\d)")


class ReleaseWriter:
    """Writes a checkpoint that Megatron loads as a release: weights alone, iteration 0, at any parallel layout.

    `fill` gives the values of a region when they are to be written; one chunk (64 MiB, or one row) is held at a time.
    Each part is written as DCP writes one rank's share, into one file.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], fill: Filler) -> None:
        self.specs, self._fill = specs, fill
        # What Megatron's loader needs beside the tensors. Version 3 is the rules' order of rows in qkv.
        content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}
        self._objects = {"common_state/shard_0_1": common, **_extra_states(specs)}
        chunks = (chunk for name, spec in specs.items() for chunk in _chunk_grid(name, spec))
        parts = group(chunks, self._nbytes, PART_BYTES)
        nbytes = [[self._nbytes(chunk) for chunk in part] for part in parts]
        self.sizes, self.block_bytes = list(map(sum, nbytes)), max(chain(*nbytes), default=0)
        plans = [SavePlan([self._item(region) for region in part], planner_data={}) for part in parts]
        plans[0].items[:0] = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        # The planner's own call would compare every two chunks of a tensor, for minutes where there are many experts.
        plans, metadata = create_default_global_save_plan(plans)
        self._plans = _Storage(Path()).prepare_global_plan(plans)  # it names the files
        files = [f"{_RELEASE}/{plan.storage_data.prefix}0{DEFAULT_SUFFIX}" for plan in self._plans]
        self.parts = [Part(index, file, 0) for index, file in enumerate(files)]
        self._metadata = replace(metadata, planner_data={})

    def _nbytes(self, region: Region) -> int:
        return region.volume * self.specs[region.name].dtype.itemsize

    def _item(self, region: Region) -> WriteItem:
        spec = self.specs[region.name]
        chunk = ChunkStorageMetadata(torch.Size(region.offset), torch.Size(region.shape))
        data = TensorWriteData(chunk, TensorProperties(dtype=spec.dtype), torch.Size(spec.shape))
        return WriteItem(MetadataIndex(region.name, torch.Size(region.offset)), WriteItemType.SHARD, tensor_data=data)

    def contents(self, index: int) -> str:
        """The entries of a part: names and chunks."""
        return str([(item.index.fqn, item.tensor_data and item.tensor_data.chunk) for item in self._plans[index].items])

    def prepare(self, folder: Path) -> None:
        """Make the folder of the iteration."""
        (folder / _RELEASE).mkdir(exist_ok=True)

    def write(self, index: int, folder: Path, block: Block) -> Part:
        """Write one part as its own file."""
        writer = _Storage(folder / _RELEASE)
        plan = self._plans[index]
        try:
            # Every part has a checksum of its own; torch's own cost more than the writing, and nothing reads them.
            with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                results = writer.write_data(plan, _BlockPlanner(self._fill, block, self._objects)).wait()
        except RuntimeError as error:
            # After a failed write torch.save still ends its archive, and raises the error of that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        infos: dict[MetadataIndex, _StorageInfo] = {result.index: result.storage_data for result in results}
        entries = tuple((infos[item.index].offset, infos[item.index].length) for item in plan.items)
        path = folder / _RELEASE / infos[plan.items[0].index].relative_path
        return replace(self.parts[index], length=path.stat().st_size, digest=writer.hasher.digest, entries=entries)

    def finish(self, folder: Path, written: Sequence[Part]) -> None:
        """Write DCP's metadata, and the files by which Megatron finds it."""
        results = []
        for plan, part in zip(self._plans, written, strict=True):
            file = part.file.rpartition("/")[2]
            for item, (start, length) in zip(plan.items, part.entries, strict=True):
                results.append(WriteResult(item.index, length, _StorageInfo(file, start, length)))
        place = folder / _RELEASE
        _Storage(place).finish(self._metadata, [results])
        (place / FORMAT).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
        (folder / TRACKER).write_text(_RELEASE)


class _Storage(FileSystemWriter):
    """DCP's files, without the random id and the path that DCP would note: equal input gives equal bytes."""

    def __init__(self, place: Path) -> None:
        # The engine flushes. Nothing is copied ahead: there is one block of memory, filled anew for each chunk.
        super().__init__(place, sync_files=False, per_thread_copy_ahead=0)
        self.fs = self._files = _HashedFiles()

    @property
    def hasher(self) -> Hasher:
        """Of the file that was opened last."""
        return self._files.hasher

    def storage_meta(self) -> StorageMeta | None:
        return None


class _HashedFiles(FileSystem):
    """DCP's access to files, which also computes the checksum of what is written."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        self.hasher = Hasher()
        with io.BufferedWriter(_HashedFile(path, self.hasher)) as stream:
            yield stream


class _HashedFile(io.FileIO):
    """A file that is written in order, in short calls (see `WRITE_BYTES`)."""

    def __init__(self, path: str | os.PathLike[str], hasher: Hasher) -> None:
        super().__init__(path, "w")
        self._hasher = hasher

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data).cast("B")[:WRITE_BYTES]
        count = super().write(view)
        self._hasher.update(view[:count])
        return count

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        raise io.UnsupportedOperation("the checksum is that of bytes in order")


class _BlockPlanner(DefaultSavePlanner):
    """Fills each chunk only when DCP is about to write it."""

    def __init__(self, fill: Filler, block: Block, objects: Mapping[str, object]) -> None:
        super().__init__()
        self._fill, self._block, self._objects = fill, block, objects

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([self._objects[name]], stream)
            return stream
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        region = Region(name, tuple(chunk.offsets), tuple(chunk.sizes))
        held = self._block.take(region.shape, write_item.tensor_data.properties.dtype)
        self._fill(region, held)
        return held


def _stack_dims(name: str) -> int:
    """How many leading dims count modules: layers where they are stacked, then the experts of a layer."""
    return bool(_STACKED.search(name)) + (".experts.experts." in name)


def _chunk_grid(name: str, spec: TensorSpec) -> Iterator[Region]:
    """One chunk per layer and expert, as Megatron reads them, and blocks of rows in what is larger than 64 MiB."""
    dims = _stack_dims(name)
    corner, rest = (0,) * (len(spec.shape) - dims), spec.shape[dims:]
    for index in product(*map(range, spec.shape[:dims])):
        one = Region(name, (*index, *corner), (*(1 for _ in index), *rest))
        yield from row_blocks(one, spec.dtype.itemsize, dim=dims)


def _extra_states(specs: Mapping[str, TensorSpec]) -> dict[str, object]:
    """Transformer Engine's entry for a module without FP8 state, an empty tensor, for each module that may ask for one.

    A model built from Transformer Engine's modules asks for it in Megatron's loader; other models ignore it.
    """
    modules = {name.rpartition(".")[0]: spec.shape[: _stack_dims(name)] or (1,) for name, spec in specs.items()}
    nothing = torch.empty(0, dtype=torch.uint8)
    result: dict[str, object] = {}
    for module, grid in modules.items():
        for index in product(*map(range, grid)):
            shard = f"{'.'.join(map(str, index))}_{'.'.join(map(str, grid))}"
            result[f"{module}._extra_state/shard_{shard}"] = nothing
    return result
