"""Saving checkpoints on the CPU: synchronous even with `--async-save`, and without a second interpreter."""

from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.training import checkpointing
from megatron.training.async_utils import maybe_finalize_async_save, schedule_async_save


def install() -> None:
    """Let Megatron wait until a checkpoint is written before it trains on.

    Its writer copies tensors from a GPU, but shares those of the CPU with training, which changes them in place: the
    checkpoint of an iteration would hold weights of later ones.
    """
    checkpointing.schedule_async_save = _save_and_wait
    # At the first save Megatron would start the process that holds this queue, which imports the main script again.
    get_write_results_queue(mp_mode="fork")


def _save_and_wait(request: Any) -> None:
    schedule_async_save(request)
    maybe_finalize_async_save(blocking=True)
