"""Conversions that are killed: nothing incomplete under the final name, the same bytes in the end.

At random calls of functions (`make test-layouts`: as many as VLBRIDGE_KILLS says, 100 by default, a quarter each into
imports and exports of a dense model and of one with experts), and at chosen points. No moment depends on a clock.
"""

import functools
import itertools
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.hf import writer as hf_writer
from megatron_vlbridge.checkpoint.stream.engine import Options
from megatron_vlbridge.checkpoint.torch_dist import writer as torch_dist_writer
from tests import reference
from tests.calls import at_each_call, count_calls
from tests.cases import in_turn, later
from tests.functional.pool import PRELOAD

NOTE = "megatron_vlbridge.checkpoint.stream.staging.Staging.note"
KILLS = int(os.environ.get("VLBRIDGE_KILLS", "100"))
CONVERT = {"import": import_checkpoint, "export": export_checkpoint}


def convert(kind: str, source: Path, target: Path) -> None:
    """Continue or begin, in tens of parts although the checkpoint is tiny."""
    torch.set_num_threads(1)
    hf_writer.PART_BYTES = torch_dist_writer.PART_BYTES = 20_000
    CONVERT[kind](source, target, options=Options(workers=2), resume=True)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes that begin with everything imported, from the server of the pool's workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context


@dataclass(frozen=True)
class Case:
    """What is converted, and what the files of the result are when nothing interrupts."""

    kind: str
    source: Path
    expected: dict[str, bytes]
    calls: int


@pytest.fixture(scope="module")
def cases(tmp_path_factory, processes) -> Callable[[str, str], Case]:
    @functools.cache
    def sources(model: str) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp(model)
        hf = reference.write_checkpoint(folder / "hf", layers=2, experts={} if model == "experts" else None)
        return {"import": hf, "export": import_checkpoint(hf, folder / "megatron")}

    @functools.cache
    def case(kind: str, model: str) -> Case:
        source = sources(model)[kind]
        target = source.parent / f"straight-{kind}"
        receiver, sender = processes.Pipe(duplex=False)
        run(processes, convert_and_count, (kind, source, target, sender))
        return Case(kind, source, files_of(target), receiver.recv())

    return case


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished_parts(target: Path) -> int:
    """How many parts a run that is under way, or was killed, has noted."""
    try:
        return len((target.parent / f".{target.name}.vlbridge" / "journal.jsonl").read_bytes().splitlines()) - 1
    except FileNotFoundError:
        return 0


def run(processes, function: Callable[..., None], arguments: tuple) -> bool:
    """Convert in a process of its own; whether it was killed."""
    child = processes.Process(target=function, args=arguments)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def convert_and_count(kind: str, source: Path, target: Path, sender: Any) -> None:
    """Convert, and send how many calls it took."""
    with count_calls() as calls:
        convert(kind, source, target)
    sender.send(calls[0])


def convert_until(kind: str, source: Path, target: Path, call: int) -> None:
    """Convert in a process that kills itself at this call."""
    with at_each_call(lambda number: die() if number == call else None):
        convert(kind, source, target)


@pytest.mark.parametrize(
    ("kind", "model", "wanted"),
    [
        ("import", "experts", 5),
        ("export", "dense", 5),
        *(later(kind, model, KILLS // 4) for kind in ("import", "export") for model in ("dense", "experts")),
    ],
)
def test_killed_runs_are_resumed_to_the_same_bytes(
    kind: str, model: str, wanted: int, cases, processes, tmp_path: Path
) -> None:
    case, target = cases(kind, model), tmp_path / "target"
    arguments = (kind, case.source, target)
    chance = random.Random(7)
    kills = continued = finished = 0
    for turn in itertools.count():
        if kills >= wanted:
            break
        if turn % 2 == 0:  # between two parts
            killed = run(processes, convert_and_die, (*arguments, Point(NOTE, chance.randint(1, 5), "after")))
            assert killed == (finished_parts(target) > 0)
            kills += killed
        else:
            kills += run(processes, convert_until, (*arguments, chance.randint(1, case.calls)))
        if target.exists():
            assert files_of(target) == case.expected
            finished += 1
            shutil.rmtree(target)
        else:
            continued += finished_parts(target) > 0
    run(processes, convert, arguments)
    assert files_of(target) == case.expected
    print(f"{kind}, {model}: {kills} kills, {continued} left parts to continue, {finished} runs came to their end")
    assert continued > 0


@dataclass(frozen=True)
class Point:
    """The n-th call of a function; a process dies before it, after it, or, where it writes, when half is written."""

    function: str
    nth: int
    moment: str

    def __str__(self) -> str:
        return f"{self.moment}-{self.function.rpartition('.')[2]}-{self.nth}"


def convert_and_die(kind: str, source: Path, target: Path, point: Point) -> None:
    """Convert in a process that kills itself at a point."""
    owner, _, name = point.function.rpartition(".")
    call, calls = pkgutil.resolve_name(point.function), itertools.count(1)

    def deadly(first: Any, *more: Any, **options: Any) -> Any:
        now = next(calls) == point.nth
        if now and point.moment == "before":
            die()
        if now and point.moment == "within":  # the second argument is what is to be written
            more = (more[0][: len(more[0]) // 2], *more[1:])
        result = call(first, *more, **options)
        if now:
            die()
        return result

    setattr(pkgutil.resolve_name(owner), name, deadly)
    convert(kind, source, target)


CHECKPOINT = "megatron_vlbridge.checkpoint"
BOTH = [
    *(Point("os.replace", 1, moment) for moment in ("before", "after")),  # the journal is begun
    *(Point("os.fsync", nth, moment) for nth in (1, 7) for moment in ("before", "after")),  # of a part
    Point("pathlib.Path.write_bytes", 1, "within"),  # config.json
    Point("shutil.copyfile", 1, "before"),
    Point("shutil.copyfile", 1, "after"),
    *(Point(f"{CHECKPOINT}.conversion.write_checksums", 1, moment) for moment in ("before", "after")),
    Point(f"{CHECKPOINT}.stream.checksums.digest_range", 1, "after"),
    *(Point(f"{CHECKPOINT}.stream.staging.sync_tree", 1, moment) for moment in ("before", "after")),
]
NAMED = {kind: Point("os.rename", nth, "after") for kind, nth in (("import", 2), ("export", 1))}  # DCP renames too
TIDYING = Point("shutil.rmtree", 2, "before")  # the first call clears the place
POINTS = {
    # The texts are the journal's, metadata.json, the tracker, vlbridge.json and the checksums.
    "import": [
        *BOTH,
        *(Point("os.rename", nth, "before") for nth in (1, 2)),
        NAMED["import"],
        TIDYING,
        *(Point("pathlib.Path.write_text", nth, "within") for nth in range(1, 6)),
    ],
    # The journal's and the checksums.
    "export": [
        *BOTH,
        Point("os.rename", 1, "before"),
        NAMED["export"],
        TIDYING,
        *(Point("pathlib.Path.write_text", nth, "within") for nth in (1, 2)),
        *(Point("os.pwrite", nth, "within") for nth in (1, 2, 20)),
    ],
}


CASES = [(kind, point) for kind, points in POINTS.items() for point in points]


@pytest.mark.parametrize(("kind", "point"), in_turn(CASES, 4), ids=str)
def test_a_run_killed_at_a_point_is_resumed_to_the_same_bytes(kind: str, point: Point, cases, processes, tmp_path):
    case, target = cases(kind, "dense"), tmp_path / "target"
    assert run(processes, convert_and_die, (kind, case.source, target, point)), "the point was not reached"
    in_place = point in (NAMED[kind], TIDYING)
    assert target.exists() == in_place
    if not in_place:
        run(processes, convert, (kind, case.source, target))
    assert files_of(target) == case.expected
    assert in_place or {path.name for path in tmp_path.iterdir()} == {"target"}
