"""Saving checkpoints on the CPU: synchronous even with `--async-save`, and without a second interpreter."""

import multiprocessing
import os
import threading
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import checkpointing
from megatron.training.async_utils import maybe_finalize_async_save, schedule_async_save


def install() -> None:
    """Let Megatron wait until a checkpoint is written before it trains on.

    Its writer copies tensors from a GPU, but shares those of the CPU with training, which changes them in place: the
    checkpoint of an iteration would hold weights of later ones.
    """
    checkpointing.schedule_async_save = _save_and_wait
    # At the first save Megatron would start the process that holds this queue: it imports the main script again, and
    # goes on when this process is killed.
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with_parent)
    filesystem_async._results_queue = manager.Queue()


def _save_and_wait(request: Any) -> None:
    schedule_async_save(request)
    maybe_finalize_async_save(blocking=True)


def _end_with_parent() -> None:
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
