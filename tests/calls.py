"""Calls of Python functions as a clock that does not depend on the machine."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def at_each_call(do: Callable[[int], None]) -> Iterator[None]:
    """In the block, call `do` with the number of each call of a function, in any thread, before it begins."""
    calls, monitoring = itertools.count(1), sys.monitoring
    tool, event = monitoring.PROFILER_ID, monitoring.events.PY_START
    monitoring.use_tool_id(tool, __name__)
    monitoring.register_callback(tool, event, lambda *_: do(next(calls)))
    monitoring.set_events(tool, event)
    try:
        yield
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


@contextmanager
def count_calls() -> Iterator[list[int]]:
    """The one number in the list is how many functions were called in the block so far."""
    count = [0]
    with at_each_call(lambda number: count.__setitem__(0, number)):
        yield count
