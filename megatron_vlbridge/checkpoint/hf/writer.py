"""Folders of safetensors files, written in parts."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from megatron_vlbridge.checkpoint.hf.header import encode_header
from megatron_vlbridge.checkpoint.hf.reader import INDEX, SINGLE
from megatron_vlbridge.checkpoint.stream.blocks import row_blocks
from megatron_vlbridge.checkpoint.stream.engine import PART_BYTES, Block, Place, Written
from megatron_vlbridge.checkpoint.stream.raw import Filler, as_bytes, write_exactly
from megatron_vlbridge.weights import Region, TensorSpec

DEFAULT_SHARD_BYTES = 5 * 10**9


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
