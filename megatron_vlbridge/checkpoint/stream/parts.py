"""A result is written in parts, ranges of files that are flushed, noted and continued as one, and a part in blocks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlbridge.checkpoint.stream.digest import Digest, digest_range
from megatron_vlbridge.weights import Region

PART_BYTES = 256 * 2**20
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Part:
    """The range of `length` bytes from byte `start` of `file`, the part number `index` of a result.

    `length`, the `digest` of its bytes, and `entries`, the (start, length) of its entries where the format asks for
    them, are known when it is written.
    """

    index: int
    file: str
    start: int
    length: int = 0
    entries: tuple[tuple[int, int], ...] = ()
    digest: Digest | None = None

    def is_intact(self, folder: Path) -> bool:
        """Whether its bytes in a folder still have the digest that they were written with."""
        path = folder / self.file
        assert self.digest is not None
        return path.is_file() and digest_range(path, self.start, self.length, self.digest.algorithm) == self.digest

    def as_json(self) -> dict[str, Any]:
        """A line of the journal."""
        return {
            "number": self.index,
            "file": self.file,
            "start": self.start,
            "length": self.length,
            "places": self.entries,
            **({self.digest.algorithm: self.digest.value} if self.digest else {}),
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Part":
        """What `as_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        entries = tuple((start, length) for start, length in line["places"])
        return cls(line["number"], line["file"], line["start"], line["length"], entries, Digest.from_json(line))


def row_blocks(
    region: Region, itemsize: int, block_bytes: int = BLOCK_BYTES, dim: int = 0, *, multiple: int = 1
) -> Iterator[Region]:
    """Cut a region along one dim into blocks of at most `block_bytes`, or of one index where one is larger already.

    All blocks but the last have a `multiple` of so many indices.
    """
    if not region.volume:
        return
    rows = region.shape[dim] if region.shape else 0
    if not rows:
        yield region
        return
    step = max(1, block_bytes // (region.volume // rows * itemsize) // multiple) * multiple
    for start in range(0, rows, step):
        offset, shape = list(region.offset), list(region.shape)
        offset[dim] += start
        shape[dim] = min(step, rows - start)
        yield Region(region.name, tuple(offset), tuple(shape))


def group[T](items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> list[list[T]]:
    """Neighbouring items together, up to `limit` bytes in a group unless one item is larger; at least one group."""
    groups: list[list[T]] = [[]]
    filled = 0
    for item in items:
        if groups[-1] and filled + nbytes(item) > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += nbytes(item)
    return groups
