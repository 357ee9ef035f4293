"""Importing this lets the CPU stand for GPUs, for the checks of `tests/gpu`: with the guards and choices of a user.

NCCL is gloo, and a device has a name and events that take the time.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

from tests.te import runtime


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


runtime.enable(fp32_as_bf16=False)
torch.cuda.get_device_name = lambda device=None: "no GPU, a stand-in"
torch.cuda.Event = _Event
dist.init_process_group = _over_gloo(dist.init_process_group)
