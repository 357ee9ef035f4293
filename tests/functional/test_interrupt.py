"""Conversions that are killed: nothing incomplete under the final name, the same bytes in the end.

VLBRIDGE_KILLS says how many kills at random moments (default 100: a quarter each into imports and exports of a dense
model and of one with experts). Others fall at chosen points of a run.
"""

import functools
import itertools
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlbridge.checkpoint import checksums, safetensors, torch_dist_writer
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.engine import Options
from tests import reference
from tests.functional.pool import PRELOAD

KILLS = int(os.environ.get("VLBRIDGE_KILLS", "100"))
CONVERT = {"import": import_checkpoint, "export": export_checkpoint}


def convert(kind: str, source: Path, target: Path) -> None:
    """Continue or begin, in tens of parts although the checkpoint is tiny."""
    torch.set_num_threads(1)
    safetensors.PART_BYTES = torch_dist_writer.PART_BYTES = 20_000
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
    parts: int


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
        run(processes, convert, (kind, source, target))
        noted = checksums._read_checksums(target / checksums.CHECKSUMS)
        return Case(kind, source, files_of(target), sum(map(len, noted.values())))

    return case


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished_parts(target: Path) -> int:
    """How many parts a run that is under way, or was killed, has noted."""
    try:
        return len((target.parent / f".{target.name}.vlbridge" / "journal.jsonl").read_bytes().splitlines()) - 1
    except FileNotFoundError:
        return 0


def run(processes, function: Callable[..., None], arguments: tuple, wait: Callable[[Any], None] | None = None) -> bool:
    """Convert in a process of its own, killed when `wait` returns, if it is given; whether it was killed."""
    child = processes.Process(target=function, args=arguments)
    child.start()
    if wait is not None:
        wait(child)
        child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def until(seconds: float, child: Any) -> None:
    """Any moment, also before the first part and behind the last."""
    child.join(seconds)


def until_noted(target: Path, parts: int, seconds: float, child: Any) -> None:
    """A moment between parts: so many are noted, and some time has passed."""
    while child.is_alive() and finished_parts(target) < parts:
        time.sleep(0.001)
    child.join(seconds)


@pytest.mark.parametrize("model", ["dense", "experts"])
@pytest.mark.parametrize("kind", ["import", "export"])
def test_killed_runs_are_resumed_to_the_same_bytes(kind: str, model: str, cases, processes, tmp_path: Path) -> None:
    case, target = cases(kind, model), tmp_path / "target"
    arguments = (kind, case.source, target)
    begin = time.monotonic()
    run(processes, convert, (kind, case.source, tmp_path / "again"))
    whole = time.monotonic() - begin
    assert files_of(tmp_path / "again") == case.expected
    chance = random.Random(7)
    kills = continued = finished = 0
    for turn in itertools.count():
        if kills >= KILLS / 4:
            break
        kept = finished_parts(target)
        wait = functools.partial(until, chance.uniform(0, whole))
        if turn % 2 and kept + 1 < case.parts:
            noted, seconds = chance.randrange(kept + 1, case.parts), chance.uniform(0, whole / 50)
            wait = functools.partial(until_noted, target, noted, seconds)
        kills += run(processes, convert, arguments, wait)
        if target.exists():
            assert files_of(target) == case.expected
            finished += 1
            shutil.rmtree(target)
        else:
            continued += finished_parts(target) > 0
    run(processes, convert, arguments)
    assert files_of(target) == case.expected
    print(f"{kind}, {model}: {kills} kills, {continued} left parts to continue, {finished} runs came to their end")
    assert continued >= kills / 4


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

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

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
    Point(f"{CHECKPOINT}.checksums.digest_range", 1, "after"),
    *(Point(f"{CHECKPOINT}.staging.sync_tree", 1, moment) for moment in ("before", "after")),
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


@pytest.mark.parametrize(
    ("kind", "point"), [(kind, point) for kind, points in POINTS.items() for point in points], ids=str
)
def test_a_run_killed_at_a_point_is_resumed_to_the_same_bytes(kind: str, point: Point, cases, processes, tmp_path):
    case, target = cases(kind, "dense"), tmp_path / "target"
    assert run(processes, convert_and_die, (kind, case.source, target, point)), "the point was not reached"
    in_place = point in (NAMED[kind], TIDYING)
    assert target.exists() == in_place
    if not in_place:
        run(processes, convert, (kind, case.source, target))
    assert files_of(target) == case.expected
    assert in_place or {path.name for path in tmp_path.iterdir()} == {"target"}
