"""Random access to the items of a JSON file that is one list."""

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_vlbridge.data.sources.files.json_lines import BYTE_ORDER_MARK, CHUNK, JsonLines
from megatron_vlbridge.data.sources.files.record_index import Rows
from megatron_vlbridge.errors import VLBridgeError

_SPACE = re.compile(r"[ \t\n\r]*")
_ROWS = 10_000


class JsonList(JsonLines):
    """The items of a file `[..., ...]` (UTF-8); as `JsonLines`, where the items are in the index.

    Raises VLBridgeError: as `JsonLines`; the file is not one list.
    Example: `JsonList("train.json")[6]["conversations"]`.
    """

    unit = "item"

    def _scan(self, path: Path) -> Iterator[Rows]:
        try:
            yield from scan_list(path)
        except VLBridgeError as error:
            raise VLBridgeError(f"{self.name}: {error}") from error


def scan_list(path: Path, chunk: int = CHUNK) -> Iterator[Rows]:
    """The rows of the items: begin, end, and the number of the item from 1.

    Raises VLBridgeError: the file is not one list of JSON values.
    """
    with path.open("rb") as file:
        mark = file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
        window = _Window(file, file.seek(len(BYTE_ORDER_MARK) if mark else 0), chunk)
        if (start := window.next()) in ("\xfe", "\xff"):
            raise VLBridgeError(f"expected UTF-8 text, found {start!r} at its start; save the file as UTF-8")
        if start != "[":
            raise VLBridgeError(
                f"expected one list, [..., ...], found {start!r} at its start; a file with a JSON object on "
                "each line must end with .jsonl"
            )
        rows = []
        last = window.next(1)
        for number in count(1):
            if number == 1 and last == "]":
                break
            rows.append((*window.value(number), number))
            if len(rows) == _ROWS:
                yield np.array(rows, dtype=np.int64)
                rows = []
            last = window.next()
            if last == "]":
                break
            if last != ",":
                raise VLBridgeError(f"expected ',' or ']' after item {number}, found {last!r}")
            window.next(1)
        if rest := window.next(1):
            raise VLBridgeError(f"expected the end of the file after the list, found {rest!r}")
        yield np.array(rows, dtype=np.int64).reshape(-1, 3)


class _Window:
    """A part of a file. Each byte is one character, so that positions are bytes; JSON's own characters are ASCII."""

    def __init__(self, file: BinaryIO, offset: int, chunk: int) -> None:
        self._file, self._offset, self._chunk = file, offset, chunk
        self._text, self._place = "", 0
        self._decoder = json.JSONDecoder()

    def next(self, passed: int = 0) -> str:
        """The next character after `passed` characters and white space; "" at the end of the file."""
        self._place += passed
        while True:
            match = _SPACE.match(self._text, self._place)
            self._place = match.end() if match else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read():
                return ""

    def value(self, number: int) -> tuple[int, int]:
        """Begin and end of the value at this place."""
        while True:
            fault, end = "", 0
            try:
                _, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                fault = f"{error.msg} at byte {self._offset + error.pos}"
            except RecursionError:
                fault = "too many nesting levels"
            # A value may go on after the window: a number, or one that seems to be faulty.
            if (fault or end == len(self._text)) and self._read():
                continue
            if fault:
                raise VLBridgeError(f"item {number}: expected a JSON value, found {fault}")
            begin, self._place = self._place, end
            return self._offset + begin, self._offset + end

    def _read(self) -> bool:
        """Drop what has been passed and read on, twice as much if nothing was passed."""
        self._text, self._offset, self._place = self._text[self._place :], self._offset + self._place, 0
        content = self._file.read(max(self._chunk, len(self._text)))
        self._text += content.decode("latin-1")
        return bool(content)
