"""Folders of safetensors files: a reader that trusts no header, and a writer that streams."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, TypeGuard

import torch

from megatron_vlbridge.checkpoint.engine import PART_BYTES, Block, Place, Written
from megatron_vlbridge.checkpoint.fp8 import BlockScaled, pair_scales
from megatron_vlbridge.checkpoint.raw import Filler, Stored, as_bytes, write_exactly
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.spellings import hub_names
from megatron_vlbridge.weights import Region, TensorSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK_BYTES = 64 * 2**20
DEFAULT_SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the format's own library
MAX_DIMS, MAX_SIZE = 64, 2**63
"""What a tensor of torch can have."""
_LONGEST_FILE_NAME = 255
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")


class SafetensorsFolder:
    """The weights of a Hugging Face folder: one file, or shards that an index names.

    `table` maps each tensor to its shape and dtype, `files` to the file it lies in; `paths` are all files. Tensors have
    the names of the Hub, however the files spell them, and weights in 8 bits with scales (`fp8.py`) are read as
    bfloat16: `renamed` says in words which names differ, `scaled` are the names of such weights. Opening reads headers
    only and checks them against the file sizes and the index. Shards that are symlinks are followed, as the Hub's cache
    stores them so.

    Raises VLBridgeError, naming file and tensor, for a missing, truncated or malformed file, an index entry that points
    nowhere or out of the folder, a tensor that is there twice or in two spellings, and scales that fit no weight.

    Example: `SafetensorsFolder("Qwen3-VL-2B-Instruct").read(Region("lm_head.weight", (0, 0), (8, 2048)))`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = self._read_index()
        headers = {file: read_header(self.folder / file) for file in dict.fromkeys(self.files.values())}
        if not self.files:
            file = self._single_file()
            headers = {file: read_header(self.folder / file)}
            self.files = dict.fromkeys(headers[file], file)
        self.paths = tuple(self.folder / file for file in headers)
        found: dict[str, Stored] = {}
        for file, header in headers.items():
            found |= self._check_places(file, header)
        for name in self.files.keys() - found.keys():
            raise self._error(
                self.files[name],
                f"expected tensor {name}, as the index says, found none of this name",
                "Fetch both again.",
            )
        names, self.renamed = hub_names(found, str(self.folder))
        self._stored = pair_scales({names[name]: stored for name, stored in found.items()})
        self.table = {name: stored.spec for name, stored in self._stored.items()}
        # In the order of the data, so that who writes the same shards again writes the same bytes.
        order = (names[name] for header in headers.values() for name in header)
        self.files = {name: self._stored[name].path.name for name in order if name in self._stored}
        self.scaled = tuple(name for name, stored in self._stored.items() if isinstance(stored, BlockScaled))

    @property
    def as_on_the_hub(self) -> bool:
        """Whether the files hold what `table` says, under these names."""
        return not self.renamed and not self.scaled

    def check_scales(self) -> None:
        """Read the scales of all 8-bit weights; raises VLBridgeError for one that is no positive finite number."""
        for name in self.scaled:
            stored = self._stored[name]
            assert isinstance(stored, BlockScaled)
            with self._reading(name, stored.name):
                stored.check_scales()

    def read(self, region: Region) -> torch.Tensor:
        """The numbers of a region, as stored."""
        part = torch.empty(region.shape, dtype=self.table[region.name].dtype)
        self.read_into(region, part)
        return part

    def read_into(self, region: Region, out: torch.Tensor) -> None:
        """Put the numbers of a region into a tensor of its shape, converted to the tensor's dtype."""
        with self._reading(region.name, str(region)):
            self._stored[region.name].read_into(region.offset, out)

    @contextmanager
    def _reading(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"expected to read {what}, found: {error}"
            raise self._error(self.files[name], text, "Fetch the file again.") from error

    def _error(self, file: str, text: str, remedy: str) -> VLBridgeError:
        return VLBridgeError(f"{self.folder / file}: {text}. {remedy}")

    def _check_places(self, file: str, header: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """The tensors of one file, which must be those that the index has there."""
        for name in header:
            place = self.files.get(name)
            if place is None:
                raise self._error(
                    file, f"expected only tensors that the index names, found {name}", "Fetch both again."
                )
            if place != file:
                raise self._error(file, f"expected {name} only in {place}, found it here too", "Remove the wrong copy.")
        return header

    def _single_file(self) -> str:
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if SINGLE in found:
            return SINGLE
        if len(found) == 1:
            return found[0]
        raise VLBridgeError(
            f"{self.folder}: expected {INDEX} or one safetensors file, found {', '.join(found) or 'neither'}. "
            "Give a folder with a complete Hugging Face checkpoint."
        )

    def _read_index(self) -> dict[str, str]:
        """Tensor -> file from the index; empty when there is none."""
        found = sorted(path.name for path in self.folder.glob("*.safetensors.index.json"))
        if not found:
            return {}
        if len(found) > 1 and INDEX not in found:
            raise VLBridgeError(f"{self.folder}: expected one index, found {', '.join(found)}. Remove the wrong ones.")
        path = self.folder / (INDEX if INDEX in found else found[0])
        index = load_json_object(path)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise VLBridgeError(
                f"{path}: weight_map: expected tensor names with their files, found {weight_map!r:.80}."
            )
        for name, file in weight_map.items():
            if not is_file_name(file, ".safetensors"):
                raise VLBridgeError(
                    f"{path}: {name}: expected the name of a safetensors file in the same folder, found {file!r}. "
                    "Fetch the index again from a source that you trust."
                )
            if not (self.folder / file).is_file():
                raise VLBridgeError(f"{path}: {name}: expected in {file}, found no such file. Fetch {file}.")
        if (self.folder / SINGLE).exists() and SINGLE not in weight_map.values():
            raise VLBridgeError(
                f"{self.folder / SINGLE}: expected no file of this name beside {path.name}, which does not name it: "
                "other tools read the one where this reads the other. Remove one of the two."
            )
        return weight_map


def is_plain(name: str) -> bool:
    """Whether a name has no control characters, which files and terminals take amiss, and can be written as UTF-8."""
    return not _UNPRINTABLE.search(name)


def is_file_name(value: object, suffix: str) -> TypeGuard[str]:
    """Whether a value names a file with this suffix in the folder itself."""
    if not isinstance(value, str) or not is_plain(value) or len(value) > _LONGEST_FILE_NAME:
        return False
    return re.fullmatch(r"[^/\\]+" + re.escape(suffix), value) is not None


def load_json_object(path: Path, text: bytes | None = None) -> dict[str, Any]:
    """A JSON object without duplicate or unprintable names, from a file or from bytes that `path` is named for."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise VLBridgeError(f"{path}: expected every name once, found {twice!r:.80} twice. Fetch the file again.")
        if not is_plain("".join(result)):
            name = next(name for name in result if not is_plain(name))
            raise VLBridgeError(f"{path}: expected printable names, found {name!r:.80}. Do not trust this file.")
        return result

    try:
        value = json.loads(_read_small(path) if text is None else text, object_pairs_hook=checked)
    except VLBridgeError:
        raise
    # ValueError is bytes that are no text, text that is no JSON, or an integer of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise VLBridgeError(f"{path}: expected JSON, found: {error}. Fetch the file again.") from error
    if not isinstance(value, dict):
        raise VLBridgeError(f"{path}: expected a JSON object, found {type(value).__name__}. Fetch the file again.")
    return value


def _read_small(path: Path) -> bytes:
    """A file's content; OSError where it is larger than any header."""
    if _regular_size(path) > _MAX_HEADER:
        raise OSError(f"a file of more than {_MAX_HEADER} bytes")
    return path.read_bytes()


def _regular_size(path: Path) -> int:
    """A file's length; OSError for a pipe or device, whose reading may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    return status.st_size


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file, in the order of the data, after checking the header against the file's size."""
    try:
        size = _regular_size(path)
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise VLBridgeError(
                    f"{path}: expected a header that fits into the file's {size} bytes, found a length of {length}. "
                    "The file is truncated or no safetensors file: fetch it again."
                )
            text = stream.read(length)
    except OSError as error:
        raise VLBridgeError(f"{path}: expected a readable file, found: {error}. Fetch the file again.") from error
    header = load_json_object(path, text)
    header.pop("__metadata__", None)
    entries = sorted((_parse_entry(path, name, entry) for name, entry in header.items()), key=lambda item: item[:2])
    position = 0
    for start, end, name, _ in entries:
        if start != position:
            raise VLBridgeError(
                f"{path}: {name}: expected data at byte {position}, found {start}. Fetch the file again."
            )
        position = end
    if position != size - 8 - length:
        raise VLBridgeError(
            f"{path}: expected {position} bytes of data after the header, found {size - 8 - length}. "
            "The file is truncated or damaged: fetch it again."
        )
    return {name: Stored(path, 8 + length + start, spec) for start, _, name, spec in entries}


def _parse_entry(path: Path, name: str, entry: object) -> tuple[int, int, str, TensorSpec]:
    """`(start, end, name, spec)` of one header entry."""
    values = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise VLBridgeError(f"{path}: {name}: expected a dtype of {', '.join(_DTYPES)}, found {dtype!r}.")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise VLBridgeError(f"{path}: {name}: expected a shape and two data offsets, found {entry!r:.120}.")
    spec = TensorSpec(tuple(shape), _DTYPES[dtype])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise VLBridgeError(
            f"{path}: {name}: expected {spec.nbytes} bytes for {spec}, found {offsets[1] - offsets[0]}. "
            "The header is damaged: fetch the file again."
        )
    return offsets[0], offsets[1], name, spec


def _are_counts(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        return False
    return all(type(item) is int and 0 <= item < MAX_SIZE for item in value)


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> dict[str, str]:
    """Tensor -> file, in the order given, each file no larger than the limit unless one tensor alone is.

    The names are the Hub's: `model.safetensors`, or `model-00001-of-00002.safetensors` and so on.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        return dict.fromkeys(shards[0], SINGLE)
    total = len(shards)
    files = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    return {name: file for file, names in zip(files, shards, strict=True) for name in names}


class SafetensorsWriter:
    """Writes tensors into the files that `files` says (tensor -> file), and an index when there are several.

    `fill` gives the numbers of a region when they are to be written, a block of rows at a time. The format is a length,
    a JSON header and the plain numbers, so the parts of a file are independent. Neighbours in number lie in different
    files where they can: threads that write to one file at once hinder each other.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], files: Mapping[str, str], fill: Filler) -> None:
        self.specs, self.files, self._fill = specs, files, fill
        self.block_bytes = 0
        self._lengths: dict[str, int] = {}
        by_file: dict[str, dict[str, TensorSpec]] = {}
        for name, file in files.items():
            by_file.setdefault(file, {})[name] = specs[name]
        cut = [self._cut(file, tensors) for file, tensors in by_file.items()]
        self._parts = [part for turn in zip_longest(*cut) for part in turn if part is not None]
        self.sizes = [part.nbytes for part in self._parts]
        self._alone = {file: threading.Lock() for file in by_file}

    def _cut(self, file: str, tensors: Mapping[str, TensorSpec]) -> list[_Range]:
        """Lay one file out and cut it into parts."""
        # Wider dtypes first keeps every tensor aligned to its own size, as the format's library does.
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        part = _Range(file, 0, encode_header(ordered), [])
        parts = [part]
        for name, spec in ordered.items():
            for region in row_blocks(Region.whole(name, spec.shape), spec.dtype.itemsize):
                nbytes = region.volume * spec.dtype.itemsize
                if part.regions and part.nbytes + nbytes > PART_BYTES:
                    part = _Range(file, part.end, b"", [])
                    parts.append(part)
                part.regions.append(region)
                part.nbytes += nbytes
                self.block_bytes = max(self.block_bytes, nbytes)
        self._lengths[file] = part.end
        return parts

    def regions(self, number: int) -> Sequence[Region]:
        """What one part holds."""
        return self._parts[number].regions

    def place(self, number: int) -> Place:
        """A range of a file: its header, if it is the first, and blocks of rows."""
        part = self._parts[number]
        return Place(part.file, part.start, f"{part.head!r} {part.regions}")

    def prepare(self, folder: Path) -> None:
        """Make the files at their full length."""
        for file, length in self._lengths.items():
            with (folder / file).open("ab") as stream:
                stream.truncate(length)

    def write(self, number: int, folder: Path, block: Block) -> Written:
        """Write one range of one file."""
        part = self._parts[number]
        position = part.start + len(part.head)
        handle = os.open(folder / part.file, os.O_WRONLY)
        try:
            write_exactly(handle, part.start, part.head)
            for region in part.regions:
                held = block.take(region.shape, self.specs[region.name].dtype)
                self._fill(region, held)
                with self._alone[part.file]:  # the kernel's own lock spins
                    write_exactly(handle, position, as_bytes(held))
                position += held.nbytes
        finally:
            os.close(handle)
        return Written(part.file, part.start, position - part.start)

    def finish(self, folder: Path, _written: Sequence[Written]) -> None:
        """Write the index, as the Hub has it."""
        if len(self._lengths) > 1:
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.files.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass
class _Range:
    """Neighbouring blocks of one file; the first range begins with the header."""

    file: str
    start: int
    head: bytes
    regions: list[Region]
    nbytes: int = 0

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.start + len(self.head) + self.nbytes


def encode_header(tensors: Mapping[str, TensorSpec]) -> bytes:
    """What a file begins with: the length of the JSON, and the JSON."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = list(accumulate((spec.nbytes for spec in tensors.values()), initial=0))
    for (name, spec), start, end in zip(tensors.items(), ends[:-1], ends[1:], strict=True):
        header[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def row_blocks(region: Region, itemsize: int, block_bytes: int = BLOCK_BYTES, dim: int = 0) -> Iterator[Region]:
    """Cut a region along one dim into blocks of at most `block_bytes`, or of one index where one is larger already."""
    if not region.volume:
        return
    rows = region.shape[dim] if region.shape else 0
    if not rows:
        yield region
        return
    step = max(1, block_bytes // (region.volume // rows * itemsize))
    for start in range(0, rows, step):
        offset, shape = list(region.offset), list(region.shape)
        offset[dim] += start
        shape[dim] = min(step, rows - start)
        yield Region(region.name, tuple(offset), tuple(shape))
