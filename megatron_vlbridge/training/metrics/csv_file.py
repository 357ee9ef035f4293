"""The CSV file of a run: a row for each logged iteration, written as soon as it is known."""

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.metrics.columns import COLUMNS

Row = Mapping[str, float | None]
_HEADER = ",".join(COLUMNS)


class CsvFile:
    """Writes rows to a file. A resumed run continues it: rows from its first iteration on are replaced.

    Example: `CsvFile("metrics.csv").append({"iteration": 1, "lm_loss": 2.5})`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._begun = False

    def append(self, row: Row) -> None:
        """Write a row, whose missing columns are empty (VLBridgeError where the file is not one of a run)."""
        if not self._begun:
            self._begin(row["iteration"] or 0)
            self._begun = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def _begin(self, first: float) -> None:
        """Keep the rows before the iteration `first`. The file is replaced at once, so an interruption loses none."""
        kept = [row for row in read_rows(self.path) if row["iteration"] < first] if self.path.exists() else []
        new = self.path.with_name(f"{self.path.name}.new")
        with new.open("w", encoding="utf-8") as file:
            file.write(f"{_HEADER}\n")
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)


def check_new_file(path: str | Path, resumes: bool) -> None:
    """Reject a path that a run cannot write to, or whose rows are those of a run that this one does not continue.

    Raises VLBridgeError, naming the file and a remedy.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise VLBridgeError(f"--metrics-csv {file}: expected an existing folder, found no {file.parent}; create it")
    if file.exists() and read_rows(file) and not resumes:
        raise VLBridgeError(
            f"--metrics-csv {file}: expected a new file, found one with rows of another run; give another name, or "
            "resume that run with --load"
        )


def read_rows(path: str | Path) -> list[dict[str, float]]:
    """The rows of a file, each with the columns that it has a value of; the iterations grow.

    A last line without its end is one that is being written, or was interrupted, and is not read.

    Raises VLBridgeError: the file is not one that a run wrote; the error names file and line.
    Example: `[row["lm_loss"] for row in read_rows("metrics.csv")]`.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise VLBridgeError(f"{file}: no such file; expected one that a run wrote with --metrics-csv") from error
    except (OSError, UnicodeDecodeError) as error:
        raise VLBridgeError(f"{file}: expected a text file, found: {error}") from error
    lines = text.split("\n")[:-1]
    if not lines or lines[0] != _HEADER:
        found = repr(text.partition("\n")[0][:80]) if text else "an empty file"
        raise VLBridgeError(
            f"{file}, line 1: expected the header {_HEADER}, found {found}. Give a file that a run of this version "
            "wrote with --metrics-csv"
        )
    rows: list[dict[str, float]] = []
    for number, cells in enumerate(csv.reader(lines[1:]), start=2):
        row = _row(f"{file}, line {number}", cells)
        if rows and row["iteration"] <= rows[-1]["iteration"]:
            before = rows[-1]["iteration"]
            raise VLBridgeError(
                f"{file}, line {number}: expected an iteration after {before:.0f}, found {row['iteration']:.0f}; "
                "several runs wrote to this file: give each its own"
            )
        rows.append(row)
    return rows


def _row(where: str, cells: list[str]) -> dict[str, float]:
    if len(cells) != len(COLUMNS):
        raise VLBridgeError(
            f"{where}: expected {len(COLUMNS)} values, found {len(cells)}; delete the line, or write the file again"
        )
    row: dict[str, float] = {}
    for column, cell in zip(COLUMNS, cells, strict=True):
        try:
            if cell:
                row[column] = float(cell)
        except ValueError as error:
            raise VLBridgeError(f"{where}, {column}: expected a number, found {cell!r}; correct it") from error
    iteration = row.get("iteration", math.nan)
    if not (iteration >= 1 and iteration.is_integer()):
        raise VLBridgeError(f"{where}, iteration: expected an integer of at least 1, found {cells[0]!r}; correct it")
    return row


def _line(row: Row) -> str:
    return ",".join(_cell(row.get(column)) for column in COLUMNS) + "\n"


def _cell(value: float | None) -> str:
    """The shortest text that reads back as the same number."""
    if value is None:
        return ""
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(float(value))
