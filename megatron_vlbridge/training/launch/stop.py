"""A clean stop: a run that saves finishes its iteration and saves when it gets SIGTERM or Ctrl-C."""

import argparse
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast


def set_stop_arguments(args: argparse.Namespace) -> None:
    """Let Megatron stop at a signal where there is something to save."""
    if args.save and not args.skip_train and not args.exit_signal_handler_for_training:
        args.exit_signal_handler = True


def stop_on_interrupt(args: argparse.Namespace) -> None:
    """Let Ctrl-C do what the signal of Megatron's handler, which is installed, does; a second one ends the process."""
    if not args.exit_signal_handler:
        return
    stop = cast(Any, signal.getsignal(args.exit_signal))

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop(number, frame)

    signal.signal(signal.SIGINT, interrupt)


@contextmanager
def end_data_loaders() -> Iterator[None]:
    """Let Megatron's data loaders end their processes when it exits.

    These ignore SIGTERM, with which Python would end them before it waits for them: the process would hang.
    """
    try:
        yield
    except SystemExit as stopped:
        # Its frames hold the iterators, which end the processes when they are deleted.
        traceback.clear_frames(stopped.__traceback__)
        raise
