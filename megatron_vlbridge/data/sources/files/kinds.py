"""Which reader a file or folder has."""

from collections.abc import Callable
from pathlib import Path

from megatron_vlbridge.data.sources.files.csv_rows import CsvRows
from megatron_vlbridge.data.sources.files.json_lines import JsonLines
from megatron_vlbridge.data.sources.files.json_list import JsonList
from megatron_vlbridge.data.sources.files.shards import Shards
from megatron_vlbridge.data.sources.files.tables import STATE, DatasetRows, ParquetRows
from megatron_vlbridge.data.sources.lazy import Records
from megatron_vlbridge.errors import VLBridgeError

KINDS: dict[str, Callable[..., Records]] = {
    ".jsonl": JsonLines,
    ".json": JsonList,
    ".csv": CsvRows,
    ".tsv": CsvRows,
    ".parquet": ParquetRows,
    ".tar": Shards,
}
DICT = "dataset_dict.json"


def open_records(path: Path, *, name: str, cache: str | Path | None = None) -> Records:
    """The records of a file, by its ending, or of a folder, by what is in it.

    Raises VLBridgeError: it has no known ending, or cannot be read.
    Example: `open_records(Path("train.parquet"), name="train data train.parquet")[6]`.
    """
    if not path.is_dir():
        if path.suffix not in KINDS:
            raise VLBridgeError(f"{name}: expected a file that ends with {', '.join(KINDS)}")
        return KINDS[path.suffix](path, name=name, cache=cache)
    if (path / DICT).exists():
        splits = sorted(file.parent.name for file in path.glob(f"*/{STATE}"))
        raise VLBridgeError(f"{name}: expected one split of the dataset, name one of its folders: {', '.join(splits)}")
    if (path / STATE).exists():
        return DatasetRows(path, name=name)
    if any(path.glob("*.parquet")):
        return ParquetRows(path, name=name)
    if any(path.glob("*.tar")):
        return Shards(path, name=name, cache=cache)
    raise VLBridgeError(f"{name}: expected a folder saved by `datasets`, or with Parquet or tar files, found none")
