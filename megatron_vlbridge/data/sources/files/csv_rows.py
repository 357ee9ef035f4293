"""Random access to the rows of CSV files."""

import csv
import io
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_vlbridge.data.sources.files.json_lines import BYTE_ORDER_MARK, JsonLines
from megatron_vlbridge.data.sources.files.json_values import utf8_text
from megatron_vlbridge.data.sources.files.record_index import SMALL, Rows
from megatron_vlbridge.errors import VLBridgeError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LARGEST_CELL = 1 << 24  # characters; Python's limit, which holds for the whole process, is 2 ** 17
_PART = 10_000


class CsvRows(JsonLines):
    """The rows of a CSV file (UTF-8, comma) or TSV file (tab) with a header, as dicts of strings; empty cells are None.

    As `JsonLines`: where the rows begin is in the index. A quoted cell may span lines; a row is named by its first one.

    Raises VLBridgeError: as `JsonLines`; there is no header, or a column twice; a row has other cells than the header.
    Example: `CsvRows("train.csv")[6]["question"]`.
    """

    def __init__(
        self, path: str | Path, *, name: str = "", cache: str | Path | None = None, small: int = SMALL
    ) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CELL))
        self._delimiter = DELIMITERS[Path(path).suffix]
        super().__init__(path, name=name, cache=cache, small=small)
        header = next(iter(self._records(self.path)), None)
        if header is None:
            raise VLBridgeError(f"{self.name}: expected a header with the names of the columns, found an empty file")
        try:
            self._columns = [utf8_text(cell.encode("latin-1")) for cell in header.cells]
        except VLBridgeError as error:
            raise VLBridgeError(f"{self.name}, line {header.line}: {error}") from error
        if len(self._columns) == 1 and (found := [one for one in ";\t," if one in self._columns[0]]):
            where = f"{self.name}, line {header.line}"
            raise VLBridgeError(
                f"{where}: expected cells separated by {self._delimiter!r}, found {found[0]!r}; save it as .csv with "
                "commas, or as .tsv with tabs"
            )
        if twice := [column for column in self._columns if self._columns.count(column) > 1]:
            raise VLBridgeError(f"{self.name}: the column {twice[0]!r} is there twice")

    def _parse(self, content: bytes) -> dict[str, str | None]:
        text = io.StringIO(utf8_text(content), newline="")
        [cells] = csv.reader(text, delimiter=self._delimiter, strict=True)
        if len(cells) != len(self._columns):
            raise VLBridgeError(f"expected {len(self._columns)} cells ({', '.join(self._columns)}), found {len(cells)}")
        return {column: cell or None for column, cell in zip(self._columns, cells, strict=True)}

    def _scan(self, path: Path) -> Iterator[Rows]:
        part: list[tuple[int, int, int]] = []
        for place, record in enumerate(self._records(path)):
            if place:  # after the header
                part.append(record[:3])
            if len(part) == _PART:
                yield np.array(part, dtype=np.int64)
                part = []
        yield np.array(part, dtype=np.int64).reshape(-1, 3)

    def _records(self, path: Path) -> Iterator["_Record"]:
        with path.open("rb") as file:
            start = file.read(len(BYTE_ORDER_MARK))
            if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                raise VLBridgeError(f"{self.name}: expected UTF-8 text, found UTF-16; save the file as UTF-8")
            mark = start == BYTE_ORDER_MARK
            position, number = file.seek(len(BYTE_ORDER_MARK) if mark else 0), 0

            def lines() -> Iterator[str]:
                nonlocal position, number
                for line in file:
                    position, number = position + len(line), number + 1
                    yield line.decode("latin-1")  # each byte is a character; those of CSV are ASCII

            begin, first = position, 1
            try:
                for cells in csv.reader(lines(), delimiter=self._delimiter, strict=True):
                    if cells:
                        yield _Record(begin, position, first, cells)
                    begin, first = position, number + 1
            except csv.Error as error:
                where = f"{self.name}, line {first}"
                hint = "; end lines with LF or CRLF, not with CR alone" if "new-line character" in str(error) else ""
                raise VLBridgeError(f"{where}: expected a row of CSV, found an error: {error}{hint}") from error


class _Record(NamedTuple):
    begin: int
    end: int
    line: int
    cells: list[str]
