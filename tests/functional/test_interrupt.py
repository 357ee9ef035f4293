"""Conversions that are killed at random moments: nothing incomplete under the final name, the same bytes in the end.

VLBRIDGE_KILLS says how many kills (default 40, half of them into imports and half into exports).
"""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_vlbridge.checkpoint import safetensors, torch_dist_writer
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.engine import Options
from tests import reference

KILLS = int(os.environ.get("VLBRIDGE_KILLS", "40"))
CONVERT = {"import": import_checkpoint, "export": export_checkpoint}


def convert(kind: str, source: Path, target: Path) -> None:
    """Continue or begin, in tens of parts although the checkpoint is tiny."""
    torch.set_num_threads(1)
    safetensors.PART_BYTES = torch_dist_writer.PART_BYTES = 20_000
    CONVERT[kind](source, target, options=Options(workers=2), resume=True)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def run(processes, arguments: tuple, seconds: float | None = None) -> bool:
    """Convert in a process of its own, killed after some seconds if they are given; whether it was."""
    child = processes.Process(target=convert, args=arguments)
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["import", "export"])
def test_killed_runs_are_resumed_to_the_same_bytes(kind: str, processes, tmp_path: Path) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    source = hf if kind == "import" else import_checkpoint(hf, tmp_path / "megatron")
    run(processes, (kind, source, tmp_path / "straight"))
    begin = time.monotonic()
    run(processes, (kind, source, tmp_path / "again"))
    whole = time.monotonic() - begin
    expected = files_of(tmp_path / "straight")
    assert files_of(tmp_path / "again") == expected
    target, journal = tmp_path / "target", tmp_path / ".target.vlbridge" / "journal.jsonl"
    chance = random.Random(7)
    kills = continued = finished = 0
    while kills < KILLS // 2 or (not continued and kills < 5 * KILLS):  # until one falls between two parts
        kills += run(processes, (kind, source, target), chance.uniform(0, whole))
        continued += journal.exists() and len(journal.read_bytes().splitlines()) > 1
        if target.exists():
            assert files_of(target) == expected
            finished += 1
            shutil.rmtree(target)
    run(processes, (kind, source, target))
    assert files_of(target) == expected
    assert continued, "no kill fell between two parts"
    print(f"{kind}: {kills} kills, {continued} of them left parts to continue, {finished} runs came to their end")
