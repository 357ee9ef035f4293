"""Random access to the lines of a JSON Lines file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_vlbridge.data.sources.files.json_values import parse_json
from megatron_vlbridge.data.sources.files.record_index import SMALL, Rows, open_index
from megatron_vlbridge.data.sources.lazy import Records
from megatron_vlbridge.errors import VLBridgeError

type Ints = NDArray[np.int64]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK = 4 << 20
_NEWLINE = ord("\n")
# The bytes that `bytes.strip` removes.
_IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


class JsonLines(Records):
    """The values of the lines of a JSON Lines file (UTF-8); a line is read and parsed when it is requested.

    Blank lines and a byte order mark are skipped. Where the lines begin is in an index (`record_index.open_index`), so
    that a file of any size opens at once. The object may be used by several threads and processes, and pickled.

    Raises VLBridgeError: the file cannot be read or has no record; when a line is read: it is not JSON (see
    `json_values.parse_json`), or the file has changed. `location` names the line for such errors.

    Example: `JsonLines("train.jsonl")[6]["messages"]`.
    """

    unit = "line"

    def __init__(
        self, path: str | Path, *, name: str = "", cache: str | Path | None = None, small: int = SMALL
    ) -> None:
        self.path = Path(path)
        self.files = [self.path]
        self.name = name or str(path)
        self._options: dict[str, Any] = {"name": name, "cache": cache, "small": small}
        try:
            self._file = self.path.open("rb")
            self._status = _status(self._file.fileno())
            folder = None if cache is None else Path(cache)
            self._rows = open_index(self.path, type(self).__name__, self._scan, cache=folder, small=small)
        except OSError as error:
            raise VLBridgeError(f"{self.name}: cannot read the file ({error.strerror})") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.path, self._options)

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Any:
        """The value of a line."""
        try:
            return self._parse(self._content(index))
        except VLBridgeError as error:
            raise VLBridgeError(f"{self.location(index)}: {error}") from error

    def _content(self, index: int) -> bytes:
        begin, end, _ = self._rows[index].tolist()
        descriptor = self._file.fileno()
        if _status(descriptor) != self._status:
            raise VLBridgeError("the file has changed since it was opened; start again")
        try:
            # `pread`, as processes and threads share the position of the file.
            return os.pread(descriptor, end - begin, begin)
        except OSError as error:
            raise VLBridgeError(f"cannot read the file ({error.strerror})") from error

    def _parse(self, content: bytes) -> Any:
        return parse_json(content)

    def location(self, index: int) -> str:
        """The name of a line in errors, counted from 1 with blank lines: "train.jsonl, line 7"."""
        return f"{self.name}, {self.unit} {self._rows[index, 2]}"

    def _scan(self, path: Path) -> Iterator[Rows]:
        return scan_lines(path)


def _reopen(kind: type[JsonLines], path: Path, options: dict[str, Any]) -> JsonLines:
    return kind(path, **options)


def _status(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def scan_lines(path: Path, chunk: int = CHUNK) -> Iterator[Rows]:
    """The rows of the lines that are not blank: begin, end without the line feed, and the line number from 1."""
    with path.open("rb") as file, path.open("rb") as probe:
        mark = file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
        begin = position = file.seek(len(BYTE_ORDER_MARK) if mark else 0)
        number = 1
        buffer = bytearray(chunk)
        while count := file.readinto(buffer):
            values = np.frombuffer(buffer, np.uint8, count)
            ends = position + np.flatnonzero(values == _NEWLINE)
            if len(ends):
                begins = np.concatenate(([begin], ends[:-1] + 1))
                # Of a line that began in an earlier chunk, the first byte that is in this one.
                suspects = _IS_SPACE[values[np.maximum(begins - position, 0)]]
                yield _not_blank(probe, begins, ends, number, suspects)
                begin, number = int(ends[-1]) + 1, number + len(ends)
            position += count
        if begin < position:
            yield _not_blank(probe, np.array([begin]), np.array([position]), number, np.array([True]))


def _not_blank(probe: BinaryIO, begins: Ints, ends: Ints, number: int, suspects: NDArray[np.bool_]) -> Rows:
    """The rows of the lines with these bounds; `suspects` are those that may be white space."""
    rows = np.stack((begins, ends, number + np.arange(len(begins))), axis=1)
    keep = begins < ends
    for line in np.flatnonzero(suspects & keep).tolist():
        probe.seek(begins[line])
        keep[line] = not probe.read(int(ends[line] - begins[line])).isspace()
    return rows[keep]
