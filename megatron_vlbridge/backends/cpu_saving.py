"""`--async-save` where the weights are in the memory of the CPU."""

from typing import Any

from megatron.training import checkpointing
from megatron.training.async_utils import maybe_finalize_async_save, schedule_async_save


def install() -> None:
    """Let Megatron wait until a checkpoint is written before it trains on.

    Its writer copies tensors from a GPU, but shares those of the CPU with training, which changes them in place: the
    checkpoint of an iteration would hold weights of later ones.
    """
    checkpointing.schedule_async_save = _save_and_wait


def _save_and_wait(request: Any) -> None:
    schedule_async_save(request)
    maybe_finalize_async_save(blocking=True)
