"""A part of a result: the range of a file that is written, flushed, noted and continued as one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlbridge.checkpoint.stream.digest import Digest

PART_BYTES = 256 * 2**20


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
