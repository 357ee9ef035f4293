"""Importing this lets the CPU stand for GPUs, for the checks of `tests/gpu`: with the guards and choices of a user.

NCCL is gloo, a device has a name and events that take the time, and processes are forked from the host.
"""

import pickle
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.te import runtime
from tests.te.host import Worker, results


class _Event:
    """A CUDA event on the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self) -> None:
        """Now."""
        self.time = time.monotonic()

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds."""
        return 1e3 * (end.time - self.time)


def _over_gloo(init_process_group: Any) -> Any:
    def init(backend: str, **arguments: Any) -> None:
        assert backend == "nccl", backend
        init_process_group("gloo", **arguments)

    return init


def _fork(function: Callable[..., object], args: tuple[object, ...] = (), nprocs: int = 1) -> None:
    workers = [Worker("te") for _ in range(nprocs)]
    for rank, worker in enumerate(workers):
        worker.begin(_call, pickle.dumps(function), rank, args)
    results(workers)
    for worker in workers:
        worker.kill()


def _call(function: bytes, rank: int, args: tuple[object, ...]) -> None:
    """Importing this module comes before importing the function's."""
    pickle.loads(function)(rank, *args)


runtime.enable()
torch.cuda.get_device_name = lambda device=None: "no GPU, a stand-in"
torch.cuda.Event = _Event
dist.init_process_group = _over_gloo(dist.init_process_group)
torch.multiprocessing.spawn = _fork
