"""The example or another script in the processes that torchrun would start, forked from one that imported Megatron.

To import it takes a process longer than most runs of the tests. `test_docs.py`, `test_own_script.py` and
`test_failure.py` start torchrun itself.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from tests.functional.pool import PRELOAD

TIMEOUT = 300
SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"


def run_example(
    folder: Path,
    *arguments: object,
    processes: int = 1,
    script: Path = SCRIPT,
    options: tuple[str, ...] = ("--cpu",),
) -> str:
    """What the ranks print, run in `folder`; all must succeed."""
    exit_codes, output, errors = run_script(script, folder, *options, *arguments, processes=processes)
    assert not any(exit_codes), output[-2000:] + errors[-4000:]
    return output


def run_script(script: Path, folder: Path, *arguments: object, processes: int = 1) -> tuple[list[int], str, str]:
    """The exit codes of the ranks, what they print and their errors, run in `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    # The ranks meet at this store.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    command = [str(part) for part in (script, *arguments)]
    with tempfile.TemporaryDirectory() as logs:
        output, errors = Path(logs) / "output", Path(logs) / "errors"
        ranks = []
        for rank in range(processes):
            args = (command, folder, environment | {"RANK": rank, "LOCAL_RANK": rank}, output, errors)
            ranks.append(context.Process(target=_rank, args=args))
            ranks[-1].start()
        _wait(ranks)
        return [rank.exitcode for rank in ranks], output.read_text(), errors.read_text()


def _wait(ranks: list[Any]) -> None:
    """Until all have ended. The others wait for one that fails, and are ended, as all are after `TIMEOUT` seconds."""
    running = {rank.sentinel: rank for rank in ranks}
    deadline = time.monotonic() + TIMEOUT
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            for rank in running.values():
                rank.kill()
        for sentinel in ended:
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            rank.join()
            if rank.exitcode:
                for other in running.values():
                    other.kill()


def _rank(command: list[str], folder: Path, environment: dict[str, object], output: Path, errors: Path) -> None:
    for file, descriptor in ((output, sys.stdout.fileno()), (errors, sys.stderr.fileno())):
        log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, descriptor)
    # As in a process that torchrun starts.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
