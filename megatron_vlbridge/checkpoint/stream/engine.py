"""Writing a result in parts: several workers, bounded memory, and every finished part noted for a later run."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch

from megatron_vlbridge.checkpoint.stream.digest import ALGORITHM, digest_range
from megatron_vlbridge.checkpoint.stream.parts import Part
from megatron_vlbridge.checkpoint.stream.raw import SPAN_BYTES
from megatron_vlbridge.checkpoint.stream.staging import Staging, sync
from megatron_vlbridge.errors import UsageError
from megatron_vlbridge.weights import TensorSpec
from megatron_vlbridge.weights.regions import Shape

DEFAULT_MEMORY = 2**30

_BASE_BYTES = 448 * 2**20  # torch itself (310 MiB), tables of names and regions (60 MiB for 235B), journal
_SYNCERS = 2  # threads beyond the workers, so that some fill blocks while others wait for the disk


class Writer(Protocol):
    """A result that is written in parts, in any order and by several threads; equal input gives equal bytes."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of weights in each part."""

    @property
    def block_bytes(self) -> int:
        """The largest block of weights that a part holds at once, with what is held to fill it."""

    @property
    def parts(self) -> Sequence[Part]:
        """The file and the first byte of each part."""

    def contents(self, index: int) -> str:
        """Which values one part holds, in their order, as text."""

    def prepare(self, folder: Path) -> None:
        """Create the files or folders of the parts; keeps what an interrupted run has written."""

    def write(self, index: int, folder: Path, block: "Block") -> Part:
        """Write one part, over whatever is there; returns it with its length, digest and entries."""

    def finish(self, folder: Path, written: Sequence[Part]) -> None:
        """Write what needs all parts: indexes, metadata."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, in bytes on the disk; `resumed` of them an earlier run had written."""

    done: int
    total: int
    resumed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second in this run."""
        return (self.done - self.resumed) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Time to the end at this rate; infinite before the first part."""
        return (self.total - self.done) / self.rate if self.rate else float("inf")


@dataclass(frozen=True)
class Options:
    """How to run: threads that fill blocks (default: the cores) and bytes of anonymous memory, torch included."""

    workers: int | None = None
    memory: int = DEFAULT_MEMORY
    report: Callable[[Progress], None] | None = None

    def threads(self, block_bytes: int) -> int:
        """The number of workers that the memory allows. Raises UsageError where it allows none."""
        wanted = self.workers if self.workers is not None else len(os.sched_getaffinity(0))
        if wanted < 1:
            raise UsageError(f"workers: expected at least 1, found {wanted}.")
        least = self.needed(block_bytes, 1)
        if least > self.memory:
            raise UsageError(f"memory: expected at least {least} bytes for this checkpoint, found {self.memory}.")
        return max(count for count in range(1, wanted + 1) if self.needed(block_bytes, count) <= self.memory)

    def needed(self, block_bytes: int, threads: int) -> int:
        """Bytes of anonymous memory at the most."""
        return _BASE_BYTES + _SYNCERS * SPAN_BYTES + threads * (block_bytes + 2 * SPAN_BYTES)


class Block:
    """Memory that one worker fills again and again: fresh pages cost more than the copying into them."""

    def __init__(self, nbytes: int, stop: threading.Event) -> None:
        # Pages that no block reaches, such as a writer's scratch, are not touched.
        self._memory, self._stop = torch.empty(nbytes, dtype=torch.uint8), stop

    def take(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor in this memory; the one taken before is lost."""
        if self._stop.is_set():
            raise _StoppedError
        nbytes = TensorSpec(shape, dtype).nbytes
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        return self._memory[:nbytes].view(dtype).view(shape)


class _StoppedError(Exception):
    """Another worker failed, or the user interrupted."""


def run(writer: Writer, staging: Staging, options: Options) -> list[Part]:
    """Write all parts but those that the journal has at the same place and with the same bytes; then finish.

    Raises what a part raises, after all workers have stopped; parts that were finished stay in the journal.
    """
    threads = options.threads(writer.block_bytes)
    writer.prepare(staging.folder)
    state = _Run(writer, staging, options, threads)
    with ThreadPoolExecutor(threads + _SYNCERS) as pool:
        futures = [pool.submit(state.part, index) for index in range(len(writer.sizes))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # nothing is left to stop unless a part failed or the user interrupted
            state.stop.set()
            pool.shutdown(cancel_futures=True)
    finished = _results(futures)
    writer.finish(staging.folder, finished)
    return finished


def _results(futures: Sequence[Future[Part]]) -> list[Part]:
    """All results. Raises the first failure that is a cause rather than a consequence."""
    errors = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, _StoppedError):
            raise error
    return [future.result() for future in futures]


class _Run:
    """The state that the threads of one run share."""

    def __init__(self, writer: Writer, staging: Staging, options: Options, threads: int) -> None:
        self.writer, self.staging, self.options = writer, staging, options
        self.stop = threading.Event()
        self.blocks: SimpleQueue[Block] = SimpleQueue()
        for _ in range(threads):
            self.blocks.put(Block(writer.block_bytes, self.stop))
        self.lock = threading.Lock()
        self.begin = time.monotonic()
        self.done = self.resumed = 0

    def part(self, index: int) -> Part:
        kept = self.staging.finished.get(index)
        planned = self.writer.parts[index]
        in_place = kept is not None and (kept.file, kept.start) == (planned.file, planned.start)
        if kept is not None and in_place and kept.is_intact(self.staging.folder):
            self._report(index, resumed=True)
            assert kept.digest is not None
            if kept.digest.algorithm == ALGORITHM:
                return kept
            # An earlier version used another algorithm.
            return replace(kept, digest=digest_range(self.staging.folder / kept.file, kept.start, kept.length))
        block = self.blocks.get()
        try:
            written = self.writer.write(index, self.staging.folder, block)
        except BaseException:
            self.stop.set()
            raise
        finally:
            self.blocks.put(block)
        sync(self.staging.folder / written.file)
        with self.lock:
            self.staging.note(written)
        self._report(index)
        return written

    def _report(self, index: int, *, resumed: bool = False) -> None:
        with self.lock:
            self.done += self.writer.sizes[index]
            self.resumed += self.writer.sizes[index] if resumed else 0
            if self.options.report is not None:
                seconds = time.monotonic() - self.begin
                self.options.report(Progress(self.done, sum(self.writer.sizes), self.resumed, seconds))
