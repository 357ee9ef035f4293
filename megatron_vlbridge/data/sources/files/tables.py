"""Random access to the rows of Parquet files and of folders saved by Hugging Face's `datasets`."""

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_vlbridge.data.sources.lazy import Records
from megatron_vlbridge.errors import VLBridgeError

STATE = "state.json"
# The end of a name that is the number of a part; also of Spark's, such as part-00000-3f2a-c000.snappy.
_PART = re.compile(r"(?<=^part)-\d{5}-[0-9a-f]{8}-[0-9a-f]{4}-.*|[-_.]?\d+(-of-\d+)?$")
_NUMBERED = re.compile(r"\d+-of-(\d+)$")


class _Rows(Records):
    """Rows in parts (row groups, or files), of which one is read at a time, and the last `kept` are kept."""

    kept = 1

    def __init__(self, path: str | Path, name: str, places: Sequence[tuple[Path, int]], counts: Sequence[int]) -> None:
        self.path = Path(path)
        self.name = name or str(path)
        # Of each part: its file, and the row of the file that it begins with.
        self._places = places
        self.files = list(dict.fromkeys(file for file, _ in places))
        self._starts = [0, *accumulate(counts)]
        self._tables: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def item(self, index: int) -> Any:
        """The row as a dict; nulls in nested values are left out, as Arrow has every key of a list in each item."""
        part = bisect_right(self._starts, index) - 1
        try:
            [row] = self._table(part).slice(index - self._starts[part], 1).to_pylist()
        except (OSError, ValueError, OverflowError, import_pyarrow(self.name).ArrowException) as error:
            raise VLBridgeError(
                f"{self.location(index)}: cannot read the row: the file is damaged, has changed, or has values that "
                f"Python cannot represent ({error}); write it again"
            ) from error
        return {key: _without_nulls(value) for key, value in row.items()}

    def _table(self, part: int) -> Any:
        table = self._tables.get(part)
        if table is None:
            table = self._read(part)
            # Another object, as threads may read from the old one.
            kept = list(self._tables.items())[-self.kept + 1 :] if self.kept > 1 else []
            self._tables = dict(kept) | {part: table}
        return table

    def location(self, index: int) -> str:
        """The name of a row in errors, counted from 0 in its file: "a.parquet, row 6"."""
        part = bisect_right(self._starts, index) - 1
        file, first = self._places[part]
        name = self.name if file == self.path else f"{self.name}/{file.name}"
        return f"{name}, row {first + index - self._starts[part]}"

    def _read(self, part: int) -> Any:
        raise NotImplementedError


class ParquetRows(_Rows):
    """The rows of a Parquet file, or of all Parquet files in a folder, which are parts of one split.

    A row group is read as a whole, and the last one is kept: to read in random order, write groups of some 100 rows.

    Raises VLBridgeError: pyarrow is not installed; a file is not Parquet; files of several splits are in the folder;
    when a row is read: it is damaged.
    Example: `ParquetRows("train.parquet")[6]["question"]`.
    """

    def __init__(self, path: str | Path, *, name: str = "", cache: object = None) -> None:
        path = Path(path)
        files = [path] if path.is_file() else _parts(path, name or str(path))
        self._groups: list[int] = []
        places, counts = [], []
        for file in files:
            metadata = _opened(file, name).metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            places += [(file, first) for first in [0, *accumulate(sizes)][:-1]]
            self._groups += range(len(sizes))
            counts += sizes
        super().__init__(path, name, places, counts)

    def _read(self, part: int) -> Any:
        file, _ = self._places[part]
        return _opened(file, self.name).read_row_group(self._groups[part], use_threads=False)


class DatasetRows(_Rows):
    """The rows of a folder written by `datasets.Dataset.save_to_disk`, memory-mapped.

    Raises VLBridgeError: pyarrow is not installed; a file is missing or not of this format.
    Example: `DatasetRows("dataset/train")[6]["question"]`.
    """

    kept = 1000

    def __init__(self, path: str | Path, *, name: str = "", cache: object = None) -> None:
        path = Path(path)
        try:
            state = json.loads((path / STATE).read_text())
            files = [path / entry["filename"] for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VLBridgeError(f"{name or path}: expected a saved dataset, {STATE} is invalid ({error})") from error
        if state.get("_indices_data_files"):
            raise VLBridgeError(
                f"{name or path}: expected a saved dataset, found a selection of its rows, which would be ignored; "
                "save dataset.flatten_indices()"
            )
        super().__init__(path, name, [(file, 0) for file in files], [_mapped(file, name).num_rows for file in files])

    def _read(self, part: int) -> Any:
        return _mapped(self._places[part][0], self.name)


def _opened(file: Path, name: str) -> Any:
    arrow = import_pyarrow(name or str(file))
    try:
        return arrow.parquet.ParquetFile(file)
    except (arrow.ArrowInvalid, OSError) as error:
        raise VLBridgeError(f"{name or file}: expected a Parquet file, {file.name} is none ({error})") from error


def _mapped(file: Path, name: str) -> Any:
    arrow = import_pyarrow(name or str(file))
    try:
        with arrow.memory_map(str(file)) as source:
            return arrow.ipc.open_stream(source).read_all()
    except (arrow.ArrowInvalid, OSError) as error:
        raise VLBridgeError(f"{name or file}: expected an Arrow stream, {file.name} is none ({error})") from error


def import_pyarrow(name: str) -> ModuleType:
    """The module pyarrow with its Parquet reader; VLBridgeError, which names a file, if it is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise VLBridgeError(
            f'{name}: the package pyarrow is not installed, which reads tables: pip install -e ".[parquet]"'
        ) from error
    return pa


def _parts(folder: Path, name: str) -> list[Path]:
    """The Parquet files of a folder, such as train-00000-of-00002.parquet."""
    files = sorted(folder.glob("*.parquet"))
    splits = sorted({_PART.sub("", file.stem) for file in files})
    if len(splits) > 1:
        raise VLBridgeError(f"{name}: expected files of one split, found those of {', '.join(splits)}; name one file")
    for match in filter(None, (_NUMBERED.search(file.stem) for file in files)):
        if int(match[1]) != len(files):
            raise VLBridgeError(
                f"{name}: expected {int(match[1])} files, as their names say, found {len(files)}; put all of them "
                "there, or name those to be read as sources"
            )
    return files


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
