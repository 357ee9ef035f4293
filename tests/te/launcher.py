"""Training scripts started as torchrun does, in processes forked from a backend's host."""

import importlib
import io
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from tests.te.host import PRELOADS, Worker, results
from tests.te.pool import MODULES, write_from_fork


def run(backend: str, script: Path, folder: Path, *arguments: object, processes: int = 1) -> set[str]:
    """Call the script's `main` in `folder` in each process; what they called of the stand-ins for extensions."""
    # The ranks meet at this store.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    command = [str(part) for part in (script, *arguments)]
    workers = [Worker(backend) for _ in range(processes)]
    for rank, worker in enumerate(workers):
        worker.begin(_rank, backend, command, folder, common | {"RANK": rank, "LOCAL_RANK": rank})
    called = results(workers)
    for worker in workers:
        worker.kill()
    return set.union(*called)


def _rank(backend: str, command: list[str], folder: Path, environment: dict[str, Any]) -> set[str]:
    importlib.import_module(MODULES[backend])
    # On both backends the tensors are in the memory of the CPU.
    importlib.import_module("megatron_vlbridge.backends.cpu_saving").install()
    if "--async-save" in command:
        # Megatron spawns the process that saves, which imports Megatron: with this main module, the backend before it.
        sys.modules["__main__"] = sys.modules[PRELOADS[backend]]
    elif "--save" in command:
        write_from_fork()
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(folder)
    sys.argv = command
    sys.stdout = sys.stderr = log = io.StringIO()
    try:
        runpy.run_path(command[0])["main"]()
    except BaseException as end:
        if not isinstance(end, SystemExit) or end.code:
            raise RuntimeError(log.getvalue()[-4000:]) from end
    return _called()


def _called() -> set[str]:
    from tests.te.extension import CALLS
    from tests.te.references import fla, fused_weight_gradient_mlp_cuda

    return {*CALLS, *fla.CALLS, *fused_weight_gradient_mlp_cuda.CALLS}
