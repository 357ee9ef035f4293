"""What the ranks of a live model exchange: small values, and failures."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_vlbridge.errors import VLBridgeError


def rank_and_size() -> tuple[int, int]:
    """This process among all; the only one where torch.distributed is not in use."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather[T](mine: T) -> list[T]:
    """What each rank passes, in the order of the ranks, on all of them. It is pickled: for small values only."""
    _, size = rank_and_size()
    everyone = [mine] * size
    if size > 1:
        torch.distributed.all_gather_object(everyone, mine)
    return everyone


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on all ranks what one raises in this block, so that none waits for it forever. Collective at its end."""
    failure: VLBridgeError | OSError | None = None
    try:
        yield
    except (VLBridgeError, OSError) as error:
        failure = error
    texts = gather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise VLBridgeError(f"rank {rank}: {text}")
