"""The worker processes of one backend, forked from its host."""

import importlib
from multiprocessing.connection import Connection

from tests.functional import pool
from tests.te.host import Forked

# Imported by a worker before it runs anything.
MODULES = {"cpu": "tests.functional.preload", "te": "tests.te.fp32_as_bf16"}


class Pool(pool.Pool):
    """As the pool of the functional tests, in processes of this backend."""

    def __init__(self, backend: str) -> None:
        super().__init__(preload=MODULES[backend])
        self._backend = backend

    def close(self) -> None:
        """Stop all workers."""
        for worker, _ in self._workers:
            worker.kill()
        self._workers, self._runs = [], 0

    def _start(self, more: int) -> None:
        for _ in range(more):
            worker = Forked(self._backend, _work, self.preload)
            self._workers.append((worker, worker.connection))


def write_from_fork() -> None:
    """Fork the process through which Megatron's saver gets its writers' results, as its persistent workers do.

    Otherwise the first save spawns it, which imports torch and Megatron anew. This process has no threads yet.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    get_write_results_queue(mp_mode="fork")


def _work(connection: Connection, preload: str) -> None:
    importlib.import_module(preload)
    write_from_fork()
    pool._work(connection, preload)
