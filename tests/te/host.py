"""Processes that have a backend in memory; all others are forked from them.

To import Megatron, Transformer Engine and transformers takes a process longer than most of what the tests run in it. So
there is one host for each backend, also where pytest-xdist divides the tests among processes: it listens at a socket,
and forks a process for each connection.
"""

import argparse
import contextlib
import gc
import importlib
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOADS = {"cpu": "tests.functional.preload", "te": "tests.te.preload"}
# The folder of the sockets, for the processes that pytest starts.
VARIABLE = "VLBRIDGE_TEST_HOSTS"
STANDARD_FILES = (0, 1, 2)
# Imported by ranks and checks on their way, and by nothing that the preloads import.
LATE = (
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron_vlbridge.training.pretrain",
    "pytest",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "transformers.models.qwen3_vl.video_processing_qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
)


class Hosts:
    """The hosts, which end with `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hosts")
        os.environ[VARIABLE] = self._folder.name
        self._processes = [_start(backend, Path(self._folder.name) / backend) for backend in PRELOADS]

    def close(self) -> None:
        """End the hosts; processes that were forked from them end by themselves when their connections do."""
        for process in self._processes:
            process.communicate()
        del os.environ[VARIABLE]
        self._folder.cleanup()


class Forked:
    """A process forked from a host, with the standard files of this one.

    It calls `function(connection, *args)`, and then ends; `connection` here is the other end.
    """

    def __init__(self, backend: str, function: Callable[..., None], *args: object) -> None:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(Path(os.environ[VARIABLE]) / backend))
        socket.send_fds(client, [b"files"], STANDARD_FILES)
        self.connection = Connection(client.detach())
        self.connection.send(bytes(multiprocessing.current_process().authkey))
        self.connection.send((function, args))
        self._group: int | None = self.connection.recv()

    def kill(self) -> None:
        """End the process, if it has not ended, and with it all that it started."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.connection.close()


class Worker(Forked):
    """A forked process that makes calls."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend, _answer)

    def begin(self, function: Callable[..., Any], *args: object) -> None:
        """Let it call this; `results` has what it gives."""
        self.connection.send((function, args))


def results(workers: Sequence[Worker]) -> list[Any]:
    """The result of each worker's call; where one fails, all are ended: they may wait for each other.

    Raises:
        AssertionError: with the traceback.
    """
    waiting: dict[Any, int] = {worker.connection: rank for rank, worker in enumerate(workers)}
    found: dict[int, Any] = {}
    while waiting:
        for connection in wait(waiting):
            rank = waiting.pop(connection)
            try:
                failure, found[rank] = connection.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionError):
                failure = "the process died"
            if failure:
                for worker in workers:
                    worker.kill()
                raise AssertionError(f"rank {rank}:\n{failure}")
    return [found[rank] for rank in range(len(workers))]


def _start(backend: str, address: Path) -> subprocess.Popen[bytes]:
    # It listens from now on: connections wait until the host has its imports.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.te.host", backend, str(listener.fileno())],
            # It is closed when this process ends, however that may be; then the host ends too.
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            cwd=ROOT,
            # A process with threads must not fork.
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def _serve(backend: str, listener: socket.socket) -> None:
    for name in (PRELOADS[backend], *LATE):
        importlib.import_module(name)
    _read_sources_of_arguments()
    # Else the first collection of each process copies them all.
    gc.freeze()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        _reap()
        if not os.fork():
            listener.close()
            _work(connection)
        connection.close()


def _read_sources_of_arguments() -> None:
    """Megatron takes the help of its options from the sources of its classes, which Python then keeps."""
    importlib.import_module("megatron.training.arguments").add_megatron_arguments(argparse.ArgumentParser())


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _work(server: socket.socket) -> None:
    os.setsid()
    try:
        _, files, _, _ = socket.recv_fds(server, len(b"files"), len(STANDARD_FILES))
        for file, standard in zip(files, STANDARD_FILES, strict=True):
            os.dup2(file, standard)
            os.close(file)
        connection = Connection(server.detach())
        # Tensors are sent as handles, which a process gives only to those with its key.
        multiprocessing.current_process().authkey = connection.recv()
        function, args = connection.recv()
        connection.send(os.getpid())
        function(connection, *args)
    except BaseException:  # noqa: BLE001  the next line ends this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # With it all processes that it has left.
        os.killpg(0, signal.SIGKILL)


def _answer(connection: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            function, args = connection.recv()
            try:
                result = function(*args)
                connection.send(("", result))
            except BaseException:  # noqa: BLE001  the test session must receive any failure
                connection.send((traceback.format_exc(), None))


if __name__ == "__main__":
    _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
