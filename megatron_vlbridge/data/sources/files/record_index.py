"""An index of the records of a file, written once and memory-mapped: 24 bytes per record, no Python object for each."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Rows (begin, end, number): the bytes of a record, and the number under which errors name it.
type Rows = NDArray[np.int64]
# Yields the rows of a file in order, in parts.
type Scan = Callable[[Path], Iterator[Rows]]

SUFFIX = ".index"
# Smaller files are scanned in less time than a user notices, and no index is written.
SMALL = 64 << 20
_EDGE = 1 << 20
_MAGIC = b"VLBRECS1"
_HEADER = 48  # magic, digest of the file, number of rows


def open_index(path: Path, kind: str, scan: Scan, *, cache: Path | None = None, small: int = SMALL) -> Rows:
    """The rows of a file, int64 `[records, 3]`: begin and end in bytes, and the number of the record.

    The index is read from `PATH.index`, or from the folder `cache`. It is built if it is missing or does not belong to
    the file (`kind`, size, time of modification, first and last MB), and written in one step, so that several processes
    may open the same file. A file below `small` bytes, or in a folder that is read-only, is scanned each time.

    Raises OSError: the file cannot be read; VLBridgeError: from `scan`.
    Example: `open_index(Path("train.jsonl"), "JsonLines", scan_lines)[6]` is where the seventh line with content lies.
    """
    if path.stat().st_size < small:
        return _join(scan(path))
    digest = _digest(path, kind)
    target = path.with_name(path.name + SUFFIX)
    if cache is not None:
        # Files of the same name in other folders have other indices.
        folder = hashlib.sha256(os.fsencode(path.parent.resolve())).hexdigest()[:16]
        target = cache / f"{folder}-{target.name}"
    rows = _load(target, digest)
    if rows is not None:
        return rows
    try:
        _write(target, digest, scan(path))
    except OSError:
        # A read-only or full disk. An error in reading `path` occurs again.
        return _join(scan(path))
    rows = _load(target, digest)
    return _join(scan(path)) if rows is None else rows


def _digest(path: Path, kind: str) -> bytes:
    status = path.stat()
    digest = hashlib.sha256(f"{kind} {status.st_size} {status.st_mtime_ns} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, status.st_size - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.digest()


def _load(target: Path, digest: bytes) -> Rows | None:
    """The rows of an index; None if there is none, or it is another file's, or incomplete."""
    try:
        with target.open("rb") as file:
            header, size = file.read(_HEADER), os.fstat(file.fileno()).st_size
            count = int.from_bytes(header[40:], "little")
            if header[:40] != _MAGIC + digest or size != _HEADER + 24 * count or not count:
                return None
            return np.memmap(file, np.int64, "r", _HEADER, (count, 3))
    except OSError:
        return None


def _write(target: Path, digest: bytes, parts: Iterator[Rows]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(bytes(_HEADER))
            count = 0
            for part in parts:
                file.write(np.ascontiguousarray(part))
                count += len(part)
            file.seek(0)
            file.write(_MAGIC + digest + count.to_bytes(8, "little"))
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _join(parts: Iterator[Rows]) -> Rows:
    return np.concatenate([np.empty((0, 3), np.int64), *parts])
