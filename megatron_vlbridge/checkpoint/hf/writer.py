"""Folders of safetensors files, written in parts."""

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.hf.fp8 import BLOCK
from megatron_vlbridge.checkpoint.hf.header import encode_header
from megatron_vlbridge.checkpoint.hf.reader import INDEX, SINGLE
from megatron_vlbridge.checkpoint.stream.digest import Hasher
from megatron_vlbridge.checkpoint.stream.engine import Block
from megatron_vlbridge.checkpoint.stream.parts import PART_BYTES, Part, group, row_blocks
from megatron_vlbridge.checkpoint.stream.raw import Filler, as_bytes, write_exactly
from megatron_vlbridge.weights import Region, TensorSpec

DEFAULT_SHARD_BYTES = 5 * 10**9


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> dict[str, str]:
    """Tensor -> file, in the order given, each file no larger than the limit unless one tensor alone is.

    The names are the Hub's: `model.safetensors`, or `model-00001-of-00002.safetensors` and so on.
    """
    shards = group(specs, lambda name: specs[name].nbytes, max_shard_bytes)
    if len(shards) == 1:
        return dict.fromkeys(shards[0], SINGLE)
    total = len(shards)
    files = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    return {name: file for file, names in zip(files, shards, strict=True) for name in names}


@dataclass(frozen=True)
class Reads:
    """What a filler reads and holds where that is more than it fills: blocks and parts are bounded by it too.

    `bytes_of_element` are the bytes read for an element of some tensors, `scratch_bytes` what is held beside a block.
    """

    bytes_of_element: Mapping[str, int] = field(default_factory=dict)
    scratch_bytes: int = 0


class SafetensorsWriter:
    """Writes tensors into files (`files`: tensor -> file), and an index when there are several.

    `fill` gives the values of a region when they are to be written, a block of rows at a time. The format is a length,
    a JSON header and the plain values, so the parts of a file are independent. Parts with neighbouring indices lie in
    different files where possible: threads that write to one file at once contend for its lock.

    Blocks of FP8 tensors begin at a multiple of 128 rows, as those with a scale do.
    """

    def __init__(
        self, specs: Mapping[str, TensorSpec], files: Mapping[str, str], fill: Filler, reads: Reads | None = None
    ) -> None:
        self.specs, self.files, self.fill, self.reads = specs, files, fill, reads or Reads()
        by_file: dict[str, dict[str, TensorSpec]] = {}
        for name, file in files.items():
            by_file.setdefault(file, {})[name] = specs[name]
        # Wider dtypes first keeps every tensor aligned to its own size, as the format's library does.
        ordered = {
            file: dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
            for file, tensors in by_file.items()
        }
        self._heads = {file: encode_header(tensors) for file, tensors in ordered.items()}
        cut = [[(file, regions) for regions in self._cut(tensors)] for file, tensors in ordered.items()]
        ranges = [found for turn in zip_longest(*cut) for found in turn if found is not None]
        self.regions = [regions for _, regions in ranges]  # of each part
        nbytes = [[region.volume * specs[region.name].dtype.itemsize for region in regions] for regions in self.regions]
        self.sizes = list(map(sum, nbytes))
        self.block_bytes = max(chain(*nbytes), default=0) + self.reads.scratch_bytes
        self.parts: list[Part] = []
        self._lengths = dict.fromkeys(by_file, 0)
        for index, (file, _) in enumerate(ranges):
            start = self._lengths[file]
            length = self.sizes[index] + (0 if start else len(self._heads[file]))
            self.parts.append(Part(index, file, start, length))
            self._lengths[file] += length
        self._alone = {file: threading.Lock() for file in by_file}

    def _cut(self, tensors: Mapping[str, TensorSpec]) -> list[list[Region]]:
        """The blocks of one file by parts. The first part, which has the header too, may hold no block."""
        blocks = (block for name, spec in tensors.items() for block in self._blocks(Region.whole(name, spec.shape)))
        return group(blocks, lambda block: block.volume * self._bytes_of_element(block.name), PART_BYTES)

    def _blocks(self, tensor: Region) -> Iterator[Region]:
        multiple = BLOCK if self.specs[tensor.name].dtype == torch.float8_e4m3fn else 1
        return row_blocks(tensor, self._bytes_of_element(tensor.name), multiple=multiple)

    def _bytes_of_element(self, name: str) -> int:
        return max(self.specs[name].dtype.itemsize, self.reads.bytes_of_element.get(name, 0))

    def contents(self, index: int) -> str:
        """The header and the regions of a part."""
        return f"{self._head(index)!r} {self.regions[index]}"

    def _head(self, index: int) -> bytes:
        part = self.parts[index]
        return b"" if part.start else self._heads[part.file]

    def prepare(self, folder: Path) -> None:
        """Make the files at their full length."""
        for file, length in self._lengths.items():
            with (folder / file).open("ab") as stream:
                stream.truncate(length)

    def write(self, index: int, folder: Path, block: Block) -> Part:
        """Write one range of one file."""
        part, head = self.parts[index], self._head(index)
        position, hasher = part.start + len(head), Hasher()
        hasher.update(head)
        handle = os.open(folder / part.file, os.O_WRONLY)
        try:
            write_exactly(handle, part.start, head)
            for region in self.regions[index]:
                held = block.take(region.shape, self.specs[region.name].dtype)
                self.fill(region, held)
                hasher.update(as_bytes(held))
                with self._alone[part.file]:  # the kernel's own lock spins
                    write_exactly(handle, position, as_bytes(held))
                position += held.nbytes
        finally:
            os.close(handle)
        return replace(part, digest=hasher.digest)

    def finish(self, folder: Path, _written: Sequence[Part]) -> None:
        """Write the index, as the Hub has it."""
        if len(self._lengths) > 1:
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.files.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
