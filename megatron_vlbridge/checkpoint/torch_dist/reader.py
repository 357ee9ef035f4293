"""Megatron's `torch_dist` checkpoints, read region by region through torch's distributed checkpoint (DCP).

A folder holds DCP's `.metadata` (a pickle, `metadata.py`) and `*.distcp` files, and Megatron's `metadata.json`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_vlbridge.checkpoint.formats import FORMAT, locate
from megatron_vlbridge.checkpoint.stream.json_file import are_sizes, is_file_name, load_json_object
from megatron_vlbridge.checkpoint.stream.raw import Stored, gather_into, span_of
from megatron_vlbridge.checkpoint.torch_dist.metadata import read_metadata, shown
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.aliases import strip_wrappers
from megatron_vlbridge.weights import Region, TensorSpec, mixed_stacks, stack_layers
from megatron_vlbridge.weights.regions import RegionIndex, Shape, check_exact_cover

_WRAPPERS = ("module.", "model.")
_FRAME_BYTES = 64 * 2**10
_NO_WEIGHT = re.compile(r"^(optimizer|chained_\d+)\.")


class _SafeReader(FileSystemReader):
    """DCP's own reader, except that it does not run what the metadata file says."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path) / ".metadata")

    def find(self, index: MetadataIndex) -> tuple[torch.Tensor, int]:
        """The shape, dtype and strides of a stored tensor (on `meta`), and the byte at which its values start.

        torch's own loader is used for this alone: it knows where the values are in a file that torch wrote.
        """
        info = self.storage_data[index]
        with self.fs.create_stream(self.fs.concat_path(self.path, info.relative_path), "rb") as stream:
            tensor = torch.load(self._slice_file(stream, info), map_location="meta", weights_only=True)
            start: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None:
            raise ValueError("no tensor that torch saved")
        return tensor, info.offset + start


@dataclass(frozen=True)
class _Chunk:
    """One stored rectangle of a stored tensor."""

    name: str
    offset: Shape
    shape: Shape
    dtype: torch.dtype
    file: str
    start: int
    length: int

    @property
    def nbytes(self) -> int:
        return TensorSpec(self.shape, self.dtype).nbytes


@dataclass(frozen=True)
class _Frame:
    """Where torch's loader found the values in a chunk, counted from its first byte, and all bytes around them."""

    start: int
    strides: Shape
    around: tuple[bytes, bytes]


class TorchDistFolder:
    """The weights of a `torch_dist` checkpoint; optimizer state and other entries are skipped.

    `table` maps canonical names (layers stacked, whether stored stacked or one by one; without the prefix that a
    wrapper such as DistributedDataParallel puts before all of them) to shape and dtype. `folder` is the iteration's
    folder. Opening reads metadata only.

    Raises VLBridgeError, naming file and tensor, for a folder of another kind, metadata that asks for foreign classes,
    a file that is missing or truncated, and chunks that leave gaps or overlap.
    Example: `TorchDistFolder("run").read(Region("language_model.decoder.final_layernorm.weight", (0,), (8,)))`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = locate(folder)
        form = load_json_object(self.folder / FORMAT)
        if form.get("sharded_backend") != "torch_dist":
            found = form.get("sharded_backend")
            raise VLBridgeError(
                f"{self.folder / FORMAT}: sharded_backend: expected torch_dist, found {found!r:.80}. "
                "Load it with the version of Megatron that wrote it, and save it with --ckpt-format torch_dist."
            )
        self._reader = _SafeReader(self.folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._chunks: dict[str, _Chunk] = {}  # by the name that a chunk has in the index of regions
        self._places: set[tuple[str, Shape]] = set()
        stored = self._stored_tensors(metadata)
        self._wrapper = strip_wrappers(list(stored), _WRAPPERS)
        self._mixed = mixed_stacks(name.removeprefix(self._wrapper) for name in stored)
        self._index = RegionIndex(
            (
                self._canonical(Region(chunk.name, chunk.offset, chunk.shape)),
                Region.whole(key, chunk.shape),
                False,
            )
            for key, chunk in self._chunks.items()
        )
        self.table = self._make_table(stored)
        self._found: dict[str, Stored] = {}
        self._frames: dict[tuple[Shape, torch.dtype, int], _Frame] = {}

    def read(self, region: Region) -> torch.Tensor:
        """The values of a region, whatever the grid of chunks."""
        result = torch.empty(region.shape, dtype=self.table[region.name].dtype)
        self.read_into(region, result)
        return result

    def read_into(self, region: Region, out: torch.Tensor) -> None:
        """Copy the values of a region into a tensor of its shape, converted to the tensor's dtype."""
        gather_into(out, self._index.pieces(region), self._read_chunk)

    def _read_chunk(self, region: Region, out: torch.Tensor) -> None:
        """Part of one stored chunk."""
        chunk = self._chunks[region.name]
        try:
            if region.name not in self._found:
                self._found[region.name] = self._find(chunk)
            self._found[region.name].read_into(region.offset, out)
        # torch's loader may raise anything for bytes that it did not write.
        except Exception as error:
            found = f"{error}" or type(error).__name__
            text = f"expected the values of {chunk.name} at {list(chunk.offset)}, found: {found}"
            raise VLBridgeError(f"{self.folder / chunk.file}: {text}. Copy the file again.") from error

    def _find(self, chunk: _Chunk) -> Stored:
        """Where the values of a chunk start in its file.

        torch's loader takes milliseconds. It is not called for a chunk that differs from an earlier one in its values
        alone, as its answer would be the same.
        """
        kind = (chunk.shape, chunk.dtype, chunk.length)
        frame = self._frames.get(kind)
        if frame is None or frame.around != self._around(chunk, frame.start):
            stored = self._ask_torch(chunk)
            start, strides = stored.start - chunk.start, stored.strides or ()
            dense = span_of(chunk.shape, strides) * chunk.dtype.itemsize == chunk.nbytes > 0
            if dense and chunk.length - chunk.nbytes <= _FRAME_BYTES:
                self._frames[kind] = _Frame(start, strides, self._around(chunk, start))
            return stored
        spec = TensorSpec(chunk.shape, chunk.dtype)
        return Stored(self.folder / chunk.file, chunk.start + frame.start, spec, frame.strides)

    def _around(self, chunk: _Chunk, start: int) -> tuple[bytes, bytes]:
        """What a chunk holds before and after its values."""
        with (self.folder / chunk.file).open("rb", buffering=0) as stream:
            stream.seek(chunk.start)
            before = stream.read(start)
            stream.seek(chunk.start + start + chunk.nbytes)
            return before, stream.read(chunk.length - start - chunk.nbytes)

    def _ask_torch(self, chunk: _Chunk) -> Stored:
        """Where the values start, according to torch's loader."""
        tensor, start = self._reader.find(MetadataIndex(chunk.name, chunk.offset))
        found, expected = TensorSpec(tuple(tensor.shape), tensor.dtype), TensorSpec(chunk.shape, chunk.dtype)
        if found != expected:
            raise ValueError(f"{found}, expected {expected}")
        strides = tuple(map(int, tensor.stride()))
        first = start + int(tensor.storage_offset()) * tensor.itemsize
        end = first + span_of(chunk.shape, strides) * tensor.itemsize
        if tensor.numel() and not chunk.start <= first < end <= chunk.start + chunk.length:
            raise ValueError(f"values from byte {first} to {end}, outside of the chunk")
        return Stored(self.folder / chunk.file, first, expected, strides)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights, and the metadata that describes them."""
        names = dict.fromkeys(chunk.file for chunk in self._chunks.values())
        return (self.folder / ".metadata", *(self.folder / name for name in names))

    def _canonical(self, region: Region) -> Region:
        """The place of a stored tensor's region in the table."""
        name = region.name.removeprefix(self._wrapper)
        return stack_layers(Region(name, region.offset, region.shape), self._mixed)

    def _error(self, name: str, text: str) -> VLBridgeError:
        return VLBridgeError(f"{self.folder / '.metadata'}: {name}: {text}. The folder is damaged: copy it again.")

    def _stored_tensors(self, metadata: Metadata) -> dict[str, TensorSpec]:
        """The weights by their stored names; notes their chunks after checking each against its file."""
        stored = {}
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or _NO_WEIGHT.match(name):
                continue
            size, chunks = getattr(entry, "size", None), getattr(entry, "chunks", None)
            dtype = getattr(getattr(entry, "properties", None), "dtype", None)
            if not are_sizes(size, tuple) or not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
                found = f"{shown(size)}, {shown(dtype)}, {shown(chunks)}"
                raise self._error(name, f"expected a shape, a dtype and a list of chunks, found {found}")
            stored[name] = TensorSpec(tuple(size), dtype)
            for chunk in chunks:
                self._note_chunk(name, stored[name], chunk)
        return stored

    def _note_chunk(self, name: str, spec: TensorSpec, chunk: Any) -> None:
        offset, shape = (getattr(chunk, key, None) for key in ("offsets", "sizes"))
        dims = len(spec.shape)
        if not (are_sizes(offset, tuple) and are_sizes(shape, tuple) and len(offset) == len(shape) == dims):
            found = f"{shown(offset)} and {shown(shape)}"
            raise self._error(name, f"expected chunks with {dims} offsets and sizes, found {found}")
        info: Any = self._reader.storage_data.get(MetadataIndex(name, offset))
        file = getattr(info, "relative_path", None)
        if not is_file_name(file, ".distcp"):
            raise self._error(name, f"expected a .distcp file in the folder for each chunk, found {shown(file)}")
        path = self.folder / file
        size = path.stat().st_size if path.is_file() else -1
        if size < 0:
            raise VLBridgeError(f"{path}: expected it to hold {name}, found no such file. Copy the folder again.")
        place: Any = (getattr(info, "offset", None), getattr(info, "length", None))
        if not are_sizes(place, tuple) or getattr(info, "transform_descriptors", None):
            found = f"{shown(place)}, {shown(getattr(info, 'transform_descriptors', None))}"
            raise self._error(name, f"expected an offset and a length in {file}, untransformed, found {found}")
        noted = _Chunk(name, tuple(offset), tuple(shape), spec.dtype, file, *place)
        if not noted.nbytes <= noted.length <= size - noted.start:
            raise VLBridgeError(
                f"{path}: expected {noted.nbytes} bytes of {name} within {noted.length} at {noted.start}, "
                f"found a file of {size} bytes. It is truncated: copy it again."
            )
        if (name, noted.offset) in self._places:
            raise self._error(name, f"expected one chunk at {list(noted.offset)}, found two")
        self._places.add((name, noted.offset))
        self._chunks[str(len(self._chunks))] = noted

    def _make_table(self, stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Canonical tensors with their shapes and dtypes; every value is in one chunk."""
        dtypes: dict[str, set[torch.dtype]] = {}
        shapes = self._index.shapes
        for name, spec in stored.items():
            canonical = self._canonical(Region.whole(name, spec.shape))
            if canonical.name not in shapes or canonical.shape[1:] != shapes[canonical.name][1:]:
                raise self._error(name, f"expected chunks that fill {spec}, found others")
            if len(canonical.shape) == len(spec.shape) and spec.shape != shapes[canonical.name]:
                raise self._error(name, f"expected chunks that fill {spec}, found only {list(shapes[canonical.name])}")
            dtypes.setdefault(canonical.name, set()).add(spec.dtype)
        for name, found in dtypes.items():
            if len(found) > 1:
                raise self._error(name, f"expected one dtype in all layers, found {sorted(map(str, found))}")
            try:
                check_exact_cover(name, self._index.regions(name), shapes[name])
            except VLBridgeError as error:
                raise self._error(name, str(error)) from error
        return {name: TensorSpec(shapes[name], found.pop()) for name, found in dtypes.items()}
