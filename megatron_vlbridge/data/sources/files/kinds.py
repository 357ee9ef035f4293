"""Which reader a file or folder has."""

from collections.abc import Callable, Sequence
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
# What may be meant as data in a folder, and what is added to such names by compression.
DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".tgz")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
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
    for pattern, kind in (("*.parquet", ParquetRows), ("*.tar", Shards)):
        if any(path.glob(pattern)):
            records = kind(path, name=name, cache=cache)
            _check_all_read(path, name, records.files)
            return records
    raise VLBridgeError(f"{name}: expected a folder saved by `datasets`, or with Parquet or tar files, found none")


def _check_all_read(folder: Path, name: str, files: Sequence[Path]) -> None:
    """Reject a folder with data beside the files that are read, which would silently be ignored."""
    read = set(files)
    for pattern in ("*", "*/*.parquet", "*/*.tar"):
        for file in sorted(folder.glob(pattern)):
            place = file.relative_to(folder)
            if _is_data(place) and file not in read and file.is_file():
                raise VLBridgeError(
                    f"{name}: {place} would not be read: expected a folder of files that end with {files[0].suffix} "
                    "alone; move it elsewhere, or name the files to be read as sources, in place of the folder"
                )


def _is_data(place: Path) -> bool:
    """Whether the name of a file in a folder is one of data; hidden files, and those that start with _, are none."""
    stem = place.with_suffix("") if place.suffix.lower() in COMPRESSED else place
    return stem.suffix.lower() in DATA and not any(part.startswith((".", "_")) for part in place.parts)
