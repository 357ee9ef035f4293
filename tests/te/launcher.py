"""Training scripts started as torchrun does, in processes forked from one that has a backend in memory."""

import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

PRELOADS = {"cpu": "tests.functional.preload", "te": "tests.te.preload"}


class Launcher:
    """Runs scripts on one backend."""

    def __init__(self, backend: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._host = context.Process(target=_host, args=(PRELOADS[backend], there))
        self._host.start()
        there.close()

    def run(self, script: Path, folder: Path, *arguments: object, processes: int = 1) -> set[str]:
        """Call the script's `main` in `folder` in each process; what they called of the stand-ins for extensions."""
        # The ranks meet at this store. Its thread must not be in the process that forks them.
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._connection.send(([str(part) for part in (script, *arguments)], folder, processes, store.port))
        failure, called = self._connection.recv()
        assert not failure, failure
        return called

    def close(self) -> None:
        """End the process from which others fork."""
        self._host.kill()
        self._host.join()


def _host(preload: str, connection: Connection) -> None:
    importlib.import_module(preload)
    importlib.import_module("megatron_vlbridge.training.pretrain")
    # On both backends the tensors are in the memory of the CPU.
    importlib.import_module("megatron_vlbridge.backends.cpu_saving").install()
    while True:
        connection.send(_launch(preload, *connection.recv()))


def _launch(preload: str, command: list[str], folder: Path, processes: int, port: int) -> tuple[str, set[str]]:
    """What failed, if anything, and what the ranks called."""
    context = multiprocessing.get_context("fork")
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    ranks: dict[Any, Any] = {}
    for rank in range(processes):
        here, there = context.Pipe(duplex=False)
        environment = common | {"RANK": rank, "LOCAL_RANK": rank}
        ranks[here] = context.Process(target=_rank, args=(preload, command, folder, environment, there))
        ranks[here].start()
        there.close()
    called: set[str] = set()
    failure = ""
    waiting = set(ranks)
    while waiting and not failure:
        for connection in wait(waiting):
            waiting.remove(connection)
            try:
                failed, of_rank = connection.recv()
            except EOFError:
                failed, of_rank = "a process died", set()
            failure, called = failure or failed, called | of_rank
    for process in ranks.values():
        _end(process, at_once=bool(failure))
    return failure, called


def _end(process: Any, *, at_once: bool) -> None:
    """Let a rank end by itself, or end it, and with it all processes that it has left."""
    if not at_once:
        process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _rank(preload: str, command: list[str], folder: Path, environment: dict[str, Any], connection: Connection) -> None:
    """One rank, in a session of its own."""
    os.setsid()
    if "--async-save" in command:
        # Megatron spawns the process that saves, which imports Megatron: with this main module, the backend before it.
        sys.modules["__main__"] = sys.modules[preload]
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(folder)
    sys.argv = command
    sys.stdout = sys.stderr = log = io.StringIO()
    try:
        runpy.run_path(command[0])["main"]()
    except BaseException as end:  # noqa: BLE001  whatever it is, the test session must hear of it
        if not isinstance(end, SystemExit) or end.code:
            failure = f"rank {environment['RANK']}:\n{log.getvalue()[-4000:]}\n{traceback.format_exc()}"
            connection.send((failure, set()))
            return
    connection.send(("", _called()))


def _called() -> set[str]:
    from tests.te.extension import CALLS
    from tests.te.references import fused_weight_gradient_mlp_cuda

    return set(CALLS) | set(fused_weight_gradient_mlp_cuda.CALLS)
