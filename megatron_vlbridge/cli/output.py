"""Printing to a reader that may go away: `vlbridge inspect DIR | head` ends quietly, with the exit code of the work."""

import os
import sys
from pathlib import Path
from typing import TextIO


def open_closed_streams() -> None:
    """Give the null device to stdout and stderr where the caller has closed them (`2>&-`): Python sets them to None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  it stays open


def show(text: str, *, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print now, to stdout by default. Once the reader has closed the pipe, the rest goes nowhere."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, end=end, file=stream, flush=True)
    except BrokenPipeError:
        _discard(stream)


def flush() -> None:
    """Print what is still buffered, so that the interpreter's own attempt at its end finds nothing to complain of."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Let the stream write to the null device. Its buffer still holds what the pipe did not take."""
    handle = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(handle, stream.fileno())
    finally:
        os.close(handle)
