"""What the ranks of a live model exchange: small values, and failures."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch

from megatron_vlbridge.errors import VLBridgeError

LONGEST_WAIT = timedelta(days=1)


def rank_and_size() -> tuple[int, int]:
    """This process among all; the only one where torch.distributed is not in use."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather[T](mine: T, group: torch.distributed.ProcessGroup | None = None) -> list[T]:
    """What each rank passes, in the order of the ranks, on all of them. It is pickled: for small values only.

    `group`, if any, has all ranks.
    """
    _, size = rank_and_size()
    everyone = [mine] * size
    if size > 1:
        torch.distributed.all_gather_object(everyone, mine, group=group)
    return everyone


@contextmanager
def long_wait() -> Iterator[torch.distributed.ProcessGroup | None]:
    """A group of all ranks in which a rank waits up to `LONGEST_WAIT` for the others, whatever the timeout of the run.

    For gather after work on some ranks that may take longer. A rank that ends its process ends the wait of the others.
    Collective at its start.
    """
    if rank_and_size()[1] == 1:
        yield None
        return
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    try:
        yield group
    finally:
        torch.distributed.destroy_process_group(group)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on all ranks what one raises in this block, so that none waits for it forever. Collective at its end."""
    failure: Exception | None = None
    try:
        yield
    except (VLBridgeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        failure = error
    texts = gather(None if failure is None else _text(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise VLBridgeError(f"rank {rank}: {text}")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, VLBridgeError | OSError) else f"{type(error).__name__}: {error}"


def in_step[T](rounds: Sequence[T], what: str) -> Iterator[tuple[T, AbstractContextManager[None]]]:
    """Rounds in which all ranks exchange something and then go on alone, each in the context that comes with it.

    Where a rank leaves that context by an error, or as a generator that is closed, the others do not wait for it in the
    next round: they raise VLBridgeError. `what` names what is done, such as `export of weights`.
    """
    for number, round_ in enumerate(rounds):
        stopped = [rank for rank, others in enumerate(gather(_GOING)) if others != _GOING]
        if stopped:
            raise VLBridgeError(
                f"rank {stopped[0]}: expected to go on with the {what}, found that it has stopped. Take all that it "
                "yields on every rank; if an error was raised there, it says why."
            )
        yield round_, _announce_stop() if number + 1 < len(rounds) else nullcontext()


_GOING, _STOPPED = "going", "stopped"


@contextmanager
def _announce_stop() -> Iterator[None]:
    try:
        yield
    except BaseException:
        gather(_STOPPED)  # in the place of the next round's; ranks that all stop here do not read it
        raise
