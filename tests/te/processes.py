"""The same function on both backends: they exclude each other in one process, so each has its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# A rank that waits for one that failed gives up after this.
TIMEOUT = timedelta(minutes=2)


class Processes:
    """`world` processes of one backend, in which Megatron is initialised anew for each call."""

    def __init__(self, backend: str, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.workers = [ProcessPoolExecutor(1, context, _prepare, (backend,)) for _ in range(world)]

    def run(self, function: Callable[..., Any], store: Path, sizes: dict[str, int], *args: Any) -> list[Any]:
        """`function(sizes, *args)` on each rank of these parallel sizes; `store` is a file that is not there yet."""
        world = len(self.workers)
        futures = [
            worker.submit(_on_rank, function, str(store), rank, world, sizes, args)
            for rank, worker in enumerate(self.workers)
        ]
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.shutdown()


def _prepare(backend: str) -> None:
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if backend == "cpu":
        from megatron_vlbridge.backends import cpu_runtime

        cpu_runtime.enable()
    else:
        from tests.te import runtime

        runtime.enable()


def _on_rank(
    function: Callable[..., Any], store: str, rank: int, world: int, sizes: dict[str, int], args: tuple[Any, ...]
) -> Any:
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        parallel_state.initialize_model_parallel(**sizes)
        return function(sizes, *args)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
