"""Sequences whose items are made when they are requested."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, overload

from megatron_vlbridge.data.sources.files.lmdb_media import MARK, read_lmdb


class LazySequence[T](Sequence[T]):
    """A sequence with slices and negative indices, of subclasses that define `__len__` and `item`."""

    @abstractmethod
    def item(self, index: int) -> T:
        """The item at an index of at least 0."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(position) for position in range(len(self))[index]]
        return self.item(range(len(self))[index])


class Records(LazySequence[Any]):
    """The records of some `files`. `name` is that of the source in errors, `location(index)` that of a record."""

    name: str
    files: Sequence[Path]

    @abstractmethod
    def location(self, index: int) -> str:
        """The name of a record in errors, such as "train.jsonl, line 7"; `index` is at least 0."""

    def media(self, index: int, source: str, folder: Path) -> str | bytes:
        """What a path in a record stands for: a file in `folder`, or the bytes if a database or the records have it.

        Raises VLBridgeError: the bytes cannot be read.
        """
        return read_lmdb(source, folder) if MARK in source else str(folder / source)

    def check_used(self, index: int, sources: Collection[str]) -> None:
        """Reject a record that has images or videos other than these `sources` of its messages."""
