"""Worker processes for the whole test session that run Megatron on the CPU over gloo."""

import gc
import importlib
import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

# Megatron with the CPU backend.
PRELOAD = "tests.functional.preload"


@dataclass(frozen=True)
class Layout:
    """A parallel layout; the rest of `world` is data-parallel.

    `stages` is Megatron's pipeline layout string, such as `Ett|ttL`, for an uneven split.
    """

    tp: int = 1
    pp: int = 1
    sp: bool = False
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    world: int = 1
    vpp: int = 1
    stages: str | None = None

    @property
    def dp(self) -> int:
        """The data-parallel size."""
        return self.world // (self.tp * self.pp * self.cp)

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "ep": self.ep, "dp": self.dp}
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        parts += ["sp"] * self.sp + ([] if self.etp is None else [f"etp{self.etp}"])
        parts += ([f"vpp{self.vpp}"] if self.vpp > 1 else []) + ([self.stages] if self.stages else [])
        return "-".join(parts) or "one-process"


class Pool:
    """Runs a function on the ranks of a layout, with Megatron initialized.

    Workers are started on demand and reused. They are restarted after a failure, since a rank that waits for a dead one
    hangs, and after `lifetime` runs, since gloo keeps threads and memory of destroyed process groups. The fork server
    of the workers imports the module `preload`.
    """

    def __init__(self, timeout: float = 300.0, lifetime: int = 16, preload: str = PRELOAD) -> None:
        self.timeout, self.lifetime, self.preload = timeout, lifetime, preload
        self._runs = 0
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], layout: Layout, **kwargs: Any) -> list[Any]:
        """Call `function(layout, **kwargs)` on each rank; returns the results in the order of the ranks."""
        if self._runs == self.lifetime:
            self.close()
        self._runs += 1
        self._start(layout.world - len(self._workers))
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank in range(layout.world):
                self._workers[rank][1].send((function, layout, rank, store, kwargs))
            results: dict[int, Any] = {}
            deadline = time.monotonic() + self.timeout
            connections = {self._workers[rank][1]: rank for rank in range(layout.world)}
            while len(results) < layout.world:
                for connection in wait([c for c, r in connections.items() if r not in results], timeout=1.0):
                    rank = connections[connection]  # type: ignore[index]
                    try:
                        failure = connection.recv()  # type: ignore[union-attr]
                    except (EOFError, ConnectionError):
                        failure = "the process died"
                    results[rank] = None if failure else torch.load(_result_file(store, rank), weights_only=False)
                    if failure:
                        self.close()
                        raise AssertionError(f"rank {rank} of {layout}:\n{failure}")
                if time.monotonic() > deadline:
                    self.close()
                    raise AssertionError(f"{layout}: no result from ranks {set(range(layout.world)) - set(results)}")
        return [results[rank] for rank in range(layout.world)]

    def close(self) -> None:
        """Stop all workers."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            # An idle worker exits by itself; one that waits for a dead rank does not.
            process.join(timeout=5)
            process.kill()
            process.join()
        self._workers, self._runs = [], 0

    def _start(self, more: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([self.preload])
        for _ in range(more):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, self.preload))
            process.start()
            there.close()
            self._workers.append((process, here))


def _work(connection: Connection, preload: str) -> None:
    # The fork server has already imported it; if that failed, the import here raises the error.
    importlib.import_module(preload)
    # Collecting garbage among all imported objects would take longer than most runs; it is collected after each run.
    gc.freeze()
    gc.disable()
    while True:
        try:
            function, layout, rank, store, kwargs = connection.recv()
        except EOFError:
            return
        try:
            # Through a file: the connection would pass a file descriptor for each tensor.
            torch.save(_on_rank(function, layout, rank, store, kwargs), _result_file(store, rank))
            connection.send("")
        except BaseException:  # noqa: BLE001  the test session must receive any failure
            connection.send(traceback.format_exc())


def _result_file(store: str, rank: int) -> str:
    return f"{store}.result{rank}"


def _on_rank(function: Callable[..., Any], layout: Layout, rank: int, store: str, kwargs: dict[str, Any]) -> Any:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=layout.world)
    try:
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            get_embedding_ranks=_embedding_ranks(layout, kwargs.get("folder")),
        )
        model_parallel_cuda_manual_seed(1234)
        _reset_loss_scales()
        return function(layout, **kwargs)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        _collect_models()


def _collect_models() -> None:
    """Models in reference cycles would keep their process groups alive, and the threads of these poll."""
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    for dispatcher in [x for x in gc.get_objects() if isinstance(x, MoETokenDispatcher)]:
        # Its last `probs` lead through the autograd graph, which the collector does not see, back to the model.
        vars(dispatcher).clear()
    gc.collect()


def _reset_loss_scales() -> None:
    """Reset the loss scale of the last micro-batch, which Megatron's schedules keep in these classes."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)


def _embedding_ranks(layout: Layout, folder: Path | None) -> Callable[[list[int]], list[int]] | None:
    """The ranks with a copy of the embedding if they may differ from Megatron's default, as in `pretrain`."""
    from megatron_vlbridge import read_config
    from megatron_vlbridge.model.mtp import embedding_ranks
    from megatron_vlbridge.model.transformer_config import language_config

    hf_config = read_config(folder) if folder and layout.stages else None
    if hf_config is None or not hf_config.text.num_mtp_layers:
        return None
    stages = {"pipeline_model_parallel_size": layout.pp, "pipeline_model_parallel_layout": layout.stages}
    config = language_config(hf_config, pipeline_dtype=torch.float32, **stages)
    return lambda ranks: embedding_ranks(ranks, config, hf_config.tie_word_embeddings)
