"""Media in LMDB databases, as `images.lmdb::key`."""

import os
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_vlbridge.errors import VLBridgeError

MARK = ".lmdb::"
_databases: dict[Path, tuple[int, Any]] = {}
_lock = Lock()
# Otherwise a child forked while another thread holds the lock would deadlock.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def read_lmdb(source: str, folder: Path) -> bytes:
    """The value of a key (UTF-8) in a database below `folder`, which is opened once in each process.

    Raises VLBridgeError: lmdb is not installed, the database cannot be read, or it has no such key.
    Example: `read_lmdb("images.lmdb::cats/1.jpg", Path("data"))`.
    """
    file, _, key = source.partition(MARK)
    path = folder / (file + MARK.rstrip(":"))
    try:
        import lmdb
    except ImportError as error:
        raise VLBridgeError(
            f'{path}: the package lmdb is not installed, which reads it: pip install -e ".[lmdb]"'
        ) from error
    try:
        with _lock:
            database = _opened(path)
        with database.begin() as transaction:
            value: bytes | None = transaction.get(key.encode())
    except lmdb.Error as error:
        raise VLBridgeError(f"{path}: cannot read the LMDB database ({error})") from error
    if value is None:
        raise VLBridgeError(f"{path}: expected the key {key!r}, found none")
    return value


def _opened(path: Path) -> Any:
    """LMDB forbids to use a database in a process that forked after it was opened, or to open it twice in one."""
    import lmdb

    process, database = _databases.get(path, (0, None))
    if process != os.getpid():
        if database is not None:
            database.close()  # this process's copy
        database = lmdb.open(str(path), readonly=True, lock=False, create=False, subdir=path.is_dir(), readahead=False)
        _databases[path] = os.getpid(), database
    return database
