"""A limit of time for what may never end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, also out of a call that blocks."""

    def end(*_args: object) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
