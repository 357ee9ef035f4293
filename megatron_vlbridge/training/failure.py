"""One report of a failed training script, however many of its ranks fail.

Imports nothing but the standard library and this project's error type: it is in place before anything can fail.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_vlbridge.errors import VLBridgeError

# How long the other ranks of a node leave the report to the first, which may be slower to find the same fault.
SECONDS_FOR_FIRST_RANK = 5.0
# How long a rank leaves the report to one that crashed, which may be why this one lost its connection.
SECONDS_FOR_CRASHED_RANK = 1.0
# How long a rank that does not report waits to be ended by its launcher.
SECONDS_TO_BE_ENDED = 60.0
_POLL_SECONDS = 0.05


def report_failures() -> None:
    """From now on, an uncaught exception is reported once for all ranks; calling it again does nothing.

    A VLBridgeError is its text alone, any other exception a traceback that names the rank. Under torchrun the text is
    the last part of torchrun's own report, otherwise the last lines of stderr. The exit code is 1.

    Example:
        >>> report_failures()  # first in a script, since imports can fail too
    """
    # A process that this one spawns runs the script's first lines too; its parent reports what becomes of it.
    if sys.excepthook is not _report and multiprocessing.parent_process() is None:
        sys.excepthook = _report


def describe(error: BaseException) -> str:
    """The text that a person reads about `error`."""
    if isinstance(error, VLBridgeError):
        return f"Error: {_own_text(error)}"
    trace = "".join(traceback.format_exception(error)).rstrip()
    return f"Unexpected error on rank {os.environ.get('RANK', '0')}:\n{trace}"


def _own_text(error: VLBridgeError) -> str:
    """Without the traceback that a data loader's worker process puts around it."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return text.rpartition(f"\n{name}")[2].rstrip()


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    text = describe(error)
    # The report does not depend on stdout, whose reader may be gone or whose disk may be full.
    with suppress(OSError, ValueError):
        # Ends a line that is being rewritten, too.
        print(end="", flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    # Under other launchers a person may have set the file, which nobody prints.
    if file and "TORCHELASTIC_RUN_ID" in os.environ:
        _report_to_torchrun(Path(file), text, refused=isinstance(error, VLBridgeError))
    else:
        _print(text)
    # W&B learns from a call of sys.exit that the run failed.
    sys.exit(1)


def _print(text: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        # Another launcher: it ends this rank once the first has failed.
        time.sleep(SECONDS_FOR_FIRST_RANK)
    # Not sys.stderr: torch.distributed marks what an excepthook writes there, line by line, with the rank.
    print(text, file=sys.__stderr__, flush=True)


def _report_to_torchrun(file: Path, text: str, *, refused: bool) -> None:
    """Write the file that torchrun shows of the rank that fails first, and see to it that only one rank fails.

    Source of the format: torch/distributed/elastic/multiprocessing/errors (torch 2.13).
    """
    # First, since torchrun lists every rank that a signal ended as a failure of its own.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    extra = {"py_callstack": f"\n{text}", "timestamp": str(int(time.time()))}
    file.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
    if not refused:
        time.sleep(SECONDS_FOR_CRASHED_RANK)
    # attempt_0/reported beside attempt_0/<local rank>/error.json
    if _first_to_report(file.parent.parent / "reported"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    else:
        time.sleep(SECONDS_TO_BE_ENDED)


def _first_to_report(claim: Path) -> bool:
    """Whether this rank reports for its node: local rank 0, or another one where that has not failed in time."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end = time.monotonic() + SECONDS_FOR_FIRST_RANK
        while time.monotonic() < end and not claim.exists():
            time.sleep(_POLL_SECONDS)
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
