"""Count Python function calls, as a measure of time that does not depend on the machine."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def at_each_call(do: Callable[[int], None]) -> Iterator[None]:
    """Within the block, call `do` with the running count before each function call, in any thread."""
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
    """The only element of the list is the number of function calls in the block so far."""
    count = [0]
    with at_each_call(lambda number: count.__setitem__(0, number)):
        yield count
