"""Measure many conversations with several processes; an interrupted run continues."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from megatron_vlbridge.data.lengths.table import LengthTable
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.locks import locked

CHUNK = 1024  # conversations that a process measures at a time; after each, an interrupted run continues

READ_ONLY = (
    "it is written beside the file of --data: write a YAML file with the paths of the sources into a folder that you "
    "can write, and pass that as --data"
)

type Measure = Callable[[Sequence[Any], range], LengthTable]
type Progress = Callable[[int, int], None]


def build_table(
    conversations: Sequence[Any],
    measure: Measure,
    path: str | Path,
    fingerprint: Mapping[str, Any],
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> LengthTable:
    """Measure all conversations and save the table as `path`.

    `measure(conversations, indices)` gives the table of some of them; it and the conversations must be picklable.
    `progress(done, total)` is called after each chunk. The chunks of an interrupted or failed run with the same
    fingerprint are in `path + ".parts"`; those in which nothing failed are not measured again. The folder is removed at
    the end.

    Raises VLBridgeError: as `measure`; `workers` is not positive; there are no conversations; a file cannot be written,
    or another process writes it.
    """
    if workers < 1:
        raise VLBridgeError(f"workers: expected a positive number, found {workers}")
    if not len(conversations):
        raise VLBridgeError(f"{path}: expected at least one conversation, found none")
    folder = Path(f"{path}.parts")
    try:
        with locked(Path(path), folder):
            table = _build(conversations, measure, folder, fingerprint, workers, progress)
            table.save(path, fingerprint)
            shutil.rmtree(folder)
            return table
    except OSError as error:
        remedy = f"; {READ_ONLY}" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
        raise VLBridgeError(f"{path}: cannot write the table of lengths: {error}{remedy}") from error


def _build(
    conversations: Sequence[Any],
    measure: Measure,
    folder: Path,
    fingerprint: Mapping[str, Any],
    workers: int,
    progress: Progress | None,
) -> LengthTable:
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    parts = folder / key
    parts.mkdir(exist_ok=True)
    for other in folder.iterdir():
        if other.is_dir() and other != parts:
            shutil.rmtree(other)
    ranges = [range(start, min(start + CHUNK, len(conversations))) for start in range(0, len(conversations), CHUNK)]
    missing = [one for one in ranges if not _is_measured(_file(parts, one))]
    done = len(conversations) - sum(map(len, missing))
    for one, table in _measure_all(conversations, measure, missing, workers):
        table.save(_file(parts, one), {})
        done += len(one)
        if progress:
            progress(done, len(conversations))
    return LengthTable.join([LengthTable.open(_file(parts, one), {}) for one in ranges])


def _file(parts: Path, indices: range) -> Path:
    return parts / f"{indices.start}-{indices.stop}"


def _is_measured(file: Path) -> bool:
    """Whether an earlier run measured a chunk, and without failures: their media may have been repaired since then."""
    return file.exists() and not LengthTable.open(file, {}).failed.any()


def _measure_all(
    conversations: Sequence[Any], measure: Measure, ranges: Sequence[range], workers: int
) -> Iterator[tuple[range, LengthTable]]:
    if workers == 1 or len(ranges) < 2:
        for one in ranges:
            yield one, measure(conversations, one)
        return
    context = multiprocessing.get_context("spawn")
    # The other processes end when this one closes its end of the pipe, also by being killed.
    reader, writer = context.Pipe(duplex=False)
    with writer, ProcessPoolExecutor(workers, context, _set_task, (conversations, measure, reader)) as pool:
        try:
            yield from zip(ranges, pool.map(_run_task, ranges), strict=True)
        except BrokenProcessPool as error:
            raise VLBridgeError(
                "a worker process was killed, perhaps as memory ran out; what is finished is kept: run it again with "
                "fewer --workers"
            ) from error
        except BaseException:
            writer.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


# What each process measures; sent to it once.
_task: tuple[Sequence[Any], Measure] | None = None


def _set_task(conversations: Sequence[Any], measure: Measure, first: Connection) -> None:
    global _task
    _task = conversations, measure
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one ends the others
    Thread(target=_end_with, args=(first,), daemon=True).start()


def _end_with(first: Connection) -> None:
    """End this process when the first one does, which sends nothing. The pool alone would wait for it forever."""
    first.poll(None)
    os._exit(1)


def _run_task(indices: range) -> LengthTable:
    assert _task is not None
    conversations, measure = _task
    return measure(conversations, indices)
