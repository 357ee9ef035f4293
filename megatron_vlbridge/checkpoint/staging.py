"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vlbridge.errors import VLBridgeError


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling of `target` to work in; renamed to it at the end, removed after any error.

    Raises VLBridgeError where `target` exists, and for what the file system refuses (a full disk, missing rights).
    """
    if target.exists() or target.is_symlink():
        raise VLBridgeError(
            f"{target}: expected a name that is free, found something there. Remove it or take another."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _refused(target, error) from error
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        sync_tree(work)
        if target.exists():  # rename would replace an empty folder
            raise VLBridgeError(f"{target}: expected a name that is free, found something made meanwhile. Try again.")
        work.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below to the disk."""
    for place, _, files in os.walk(folder):
        for file in files:
            _sync(Path(place) / file)
        _sync(Path(place))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refused(target: Path, error: OSError) -> VLBridgeError:
    return VLBridgeError(
        f"{target}: expected to write it, found: {error}. Nothing was left there. See to space and rights, and retry."
    )
