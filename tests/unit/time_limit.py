"""A timeout for code that may hang."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limit(seconds: int = 300) -> Iterator[None]:
    """Raise TimeoutError in the block after the given number of seconds, also from a blocking call.

    Not a performance limit: code that does not hang needs a thousandth of it, even on a busy machine.
    """

    def end(*_args: object) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
