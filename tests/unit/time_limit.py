"""An end to what may never end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limit(seconds: int = 300) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, also out of a call that blocks.

    No limit to be measured by: what does end takes a thousandth of it, on however busy a machine.
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
