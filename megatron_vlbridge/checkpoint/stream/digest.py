"""Checksums of ranges of files."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

_READ_BYTES = 2**20


ALGORITHM = "blake3"
ALGORITHMS = (ALGORITHM, "sha256")
"""What is written, and what results of earlier versions have."""


@dataclass(frozen=True)
class Digest:
    """A checksum in hexadecimal digits, and how it is computed: one of `ALGORITHMS`."""

    algorithm: str
    value: str

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Digest":
        """The digest that an object has under the name of its algorithm. Raises ValueError unless there is just one."""
        (algorithm,) = (name for name in ALGORITHMS if name in entry)
        return cls(algorithm, entry[algorithm])


class Hasher:
    """Computes the checksum of bytes that are given in order."""

    def __init__(self, algorithm: str = ALGORITHM) -> None:
        self._algorithm = algorithm
        self._hash = blake3() if algorithm == "blake3" else hashlib.new(algorithm)

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        self._hash.update(data)

    @property
    def digest(self) -> Digest:
        """The checksum of all bytes so far."""
        return Digest(self._algorithm, self._hash.hexdigest())


def digest_range(path: Path, start: int, length: int, algorithm: str = ALGORITHM) -> Digest:
    """The checksum of a range of a file, of what is there of it where the file is shorter."""
    hasher = Hasher(algorithm)
    held = memoryview(bytearray(min(length, _READ_BYTES)))
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while length and (count := stream.readinto(held[: min(length, len(held))])):
            hasher.update(held[:count])
            length -= count
    return hasher.digest
