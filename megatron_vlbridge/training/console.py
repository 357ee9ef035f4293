"""The output of a training run: a short log instead of Megatron's, which `--verbose` prints.

Imports no Megatron at module level: `start` is called before Megatron is imported.
"""

import argparse
import atexit
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO, cast

from megatron_vlbridge.config import Config
from megatron_vlbridge.training.failure import report_failures
from megatron_vlbridge.training.log_lines import Iteration, read_event, read_iteration

_ERASE = "\r\x1b[2K"
# Packages whose warnings concern their own build options and deprecations.
_LIBRARIES = r"(megatron|torch|torchvision|transformers|transformer_engine|apex|modelopt)(\.|$)"
_LOG_LEVELS = {
    "megatron": logging.WARNING,
    # These warn at every start, evaluation or checkpoint, regardless of the arguments.
    "megatron.core.rerun_state_machine": logging.ERROR,
    "megatron.core.dist_checkpointing.strategies.torch": logging.ERROR,
    "torch.utils.cpp_extension": logging.ERROR,
}
# Megatron functions that print a message of their caller, and the package that wraps `sys.stdout.write`.
_PRINT_FUNCTIONS = frozenset({"print_rank_0", "print_rank_last"})
_STDOUT_WRAPPER = "wandb."

_short_log: "ShortLog | None" = None


def start() -> None:
    """Report failures once and shorten the log. Call it first in a training script, before any other import.

    With `--verbose` among the script's arguments Megatron's log is not changed. A second call does nothing. The output
    of the script itself is not changed.

    Example: `console.start()`, before `from megatron_vlbridge.training.pretrain import parse_arguments, run`.
    """
    global _short_log
    report_failures()
    if "--verbose" in sys.argv or _short_log is not None:
        return
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    # Of torch, and attributed to the function that calls it.
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    _short_log = ShortLog(sys.stdout, _seq_length)
    sys.stdout = cast(TextIO, _short_log)
    atexit.register(_short_log.end_line)


class ShortLog:
    """A replacement for `sys.stdout` that shortens Megatron's log and passes all other output to `stream`.

    An iteration is one line; on a terminal it overwrites the previous one. `seq_length` returns the tokens per pack.
    """

    def __init__(self, stream: TextIO, seq_length: Callable[[], int]) -> None:
        self._stream = stream
        self._seq_length = seq_length
        self._terminal = stream.isatty()
        self._rewriting = False
        self._partial = ""
        self._first: tuple[int, float] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As in `TextIO.write`."""
        if not _is_megatron(sys._getframe(1)):
            self.end_line()
            return self._stream.write(text)
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self.show(line)
        return len(text)

    def show(self, line: str) -> None:
        """Print the short form of one line of Megatron's log, if it has one."""
        if (iteration := read_iteration(line)) is not None:
            self._show_iteration(iteration)
        elif (event := read_event(line)) is not None:
            self.end_line()
            # Another rank may be overwriting a line of this terminal.
            self._stream.write(f"{_ERASE if self._terminal else ''}{event}\n")
            self._stream.flush()

    def end_line(self) -> None:
        """Keep the line that is being overwritten, and start the next one."""
        if self._rewriting:
            self._rewriting = False
            self._stream.write("\n")
            self._stream.flush()

    def _show_iteration(self, iteration: Iteration) -> None:
        text = iteration.text(self._seq_length(), self._seconds_left(iteration))
        if self._terminal:
            # A wrapped line cannot be erased.
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write(_ERASE + text)
            self._rewriting = True
            if iteration.number == iteration.last:
                self.end_line()
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def _seconds_left(self, iteration: Iteration) -> float | None:
        """Estimated from the time since the first line, including evaluations and checkpoints."""
        now = time.monotonic()
        if self._first is None:
            self._first = iteration.number, now
        first, begin = self._first
        if iteration.number <= first:
            return None
        return (now - begin) / (iteration.number - first) * (iteration.last - iteration.number)


def begin(args: argparse.Namespace, config: Config) -> None:
    """Print a summary of the run on the first rank; nothing with `--verbose`."""
    # Again, since W&B replaces the exception hook when Megatron initializes it.
    report_failures()
    if _short_log is not None:
        note("\n".join(summary(args, config)))


def summary(args: argparse.Namespace, config: Config) -> list[str]:
    """Four lines about the run, and what is not verified; `args` are Megatron's validated arguments."""
    from megatron_vlbridge import families

    tokens = args.seq_length * args.global_batch_size
    parameters = sum(math.prod(shape) for shape in families.find(config).table(config).hf_shapes.values())
    length = f"{args.train_iters:,} iterations" if args.train_iters else f"{args.train_samples:,} packs"
    names = ", ".join(args.allow_unverified)
    return [
        f"model    {config.architecture}, {parameters:,} parameters, {'bf16' if args.bf16 else 'fp32'}",
        f"layout   {_layout(args)}",
        f"batch    {args.global_batch_size:,} packs of {args.seq_length:,} tokens ({tokens:,}), {length}",
        f"weights  {_weights(args)}",
        *([f"warning  not verified equal to transformers: {names}"] if names else []),
    ]


def note(text: str) -> None:
    """Print a line on the first rank only.

    Example: `note("data     48 conversations")`.
    """
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


@contextmanager
def argument_warnings() -> Iterator[None]:
    """Print Megatron's warnings about the arguments on the first rank, such as one that it disables."""
    with warnings.catch_warnings(record=True) as found:
        warnings.filterwarnings("always", module=r"megatron\.(training|core\.transformer)\.")
        yield
    for warning in found:
        note(f"warning  {warning.message}")


def _is_megatron(frame: FrameType | None) -> bool:
    """Whether the output comes from Megatron's own code."""
    while frame is not None and (
        frame.f_code.co_name in _PRINT_FUNCTIONS or _module(frame).startswith(_STDOUT_WRAPPER)
    ):
        frame = frame.f_back
    return frame is not None and _module(frame).startswith("megatron.")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _seq_length() -> int:
    from megatron.training import get_args

    return int(get_args().seq_length)


def _layout(args: argparse.Namespace) -> str:
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "VPP": args.virtual_pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "EP": args.expert_model_parallel_size,
        "DP": args.data_parallel_size,
    }
    parts = [f"{name} {size}" for name, size in sizes.items() if size and (size > 1 or name == "DP")]
    if args.sequence_parallel:
        parts.insert(1, "SP")
    ranks = "1 process" if args.world_size == 1 else f"{args.world_size:,} processes"
    return f"{' x '.join(parts)}, {ranks} on {'the CPU' if args.cpu else 'GPUs'}"


def _weights(args: argparse.Namespace) -> str:
    from megatron_vlbridge.training.launch.start import loads_checkpoint

    if loads_checkpoint(args):
        return f"from the checkpoint in {args.load} (resumed)"
    if args.pretrained_checkpoint:
        return f"from the checkpoint in {args.pretrained_checkpoint}"
    return f"from {args.hf_folder}" if args.hf_weights else "random"
