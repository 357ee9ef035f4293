"""Conversions that are killed at random moments: nothing incomplete under the final name, the same bytes in the end.

VLBRIDGE_KILLS says how many kills (default 40, half of them into imports and half into exports).
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_vlbridge.checkpoint import safetensors, torch_dist_writer
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.engine import Options
from tests import reference

KILLS = int(os.environ.get("VLBRIDGE_KILLS", "40"))
OPTIONS = Options(workers=2)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of parts for a tiny checkpoint."""
    monkeypatch.setattr(safetensors, "PART_BYTES", 20_000)
    monkeypatch.setattr(torch_dist_writer, "PART_BYTES", 20_000)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_and_kill(work: Callable[[], object], seconds: float) -> bool:
    """Do the work in a process that is killed after some seconds; whether it was."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            if code:
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("kind", ["import", "export"])
def test_killed_runs_are_resumed_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    hf = reference.write_checkpoint(tmp_path / "hf", layers=2)
    megatron = import_checkpoint(hf, tmp_path / "megatron", options=OPTIONS)
    convert, source = (import_checkpoint, hf) if kind == "import" else (export_checkpoint, megatron)
    begin = time.monotonic()
    expected = files_of(convert(source, tmp_path / "straight", options=OPTIONS))
    whole = time.monotonic() - begin
    target, work = tmp_path / "target", tmp_path / ".target.vlbridge"
    chance = random.Random(7)
    kills = continued = finished = 0
    while kills < KILLS // 2:
        # A run that is killed early leaves the more to the next one, so that kills fall into all of its parts.
        was_killed = run_and_kill(
            lambda: convert(source, target, options=OPTIONS, resume=True), chance.uniform(0, 0.7 * whole)
        )
        kills += was_killed
        assert not was_killed or not target.exists() or files_of(target) == expected
        journal = work / "journal.jsonl"
        continued += was_killed and journal.exists() and len(journal.read_bytes().splitlines()) > 1
        if target.exists():
            assert files_of(target) == expected
            finished += 1
            shutil.rmtree(target)
    assert finished or continued
    if not target.exists():
        convert(source, target, options=OPTIONS, resume=True)
    assert files_of(target) == expected
    print(f"{kind}: {kills} kills, {continued} of them left parts to continue, {finished} runs came to their end")
