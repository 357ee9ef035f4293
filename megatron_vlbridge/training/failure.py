"""Report the failure of a training script once, for any number of failing ranks.

Imports only the standard library and this project's error type, so that it is installed before anything can fail.
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

# How long the other ranks of a node wait for the first rank to report the same error, which it may find later.
SECONDS_FOR_FIRST_RANK = 5.0
# How long a rank waits for one that crashed to report, as a lost connection may be the result of that crash.
SECONDS_FOR_CRASHED_RANK = 1.0
# How long a rank that does not report waits until its launcher terminates it.
SECONDS_UNTIL_TERMINATED = 60.0
_POLL_SECONDS = 0.05


def report_failures() -> None:
    """Install an exception hook that reports an uncaught exception once for all ranks; a second call does nothing.

    The report of a VLBridgeError is its message, that of any other exception a traceback with the rank. Under torchrun
    it is the last part of torchrun's own report, otherwise the last lines of stderr. The exit code is 1.

    Example: `report_failures()  # first in a script, since imports can fail too`.
    """
    # A spawned process also runs the first lines of the script; its parent reports its failure.
    if sys.excepthook is not _report and multiprocessing.parent_process() is None:
        sys.excepthook = _report


def describe(error: BaseException) -> str:
    """The report of an error."""
    if isinstance(error, VLBridgeError):
        text = str(error)
        if text.startswith("Caught "):  # with the traceback of a data loader's worker process before it
            text = text.rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")[2].rstrip()
        return f"Error: {text}"
    trace = "".join(traceback.format_exception(error)).rstrip()
    return f"Unexpected error on rank {os.environ.get('RANK', '0')}:\n{trace}"


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    text = describe(error)
    # Continue if stdout fails: its pipe may be closed or its disk full.
    with suppress(OSError, ValueError):
        # Also ends a progress line on the terminal.
        print(end="", flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    # Other launchers may set the variable, but do not print the file.
    if file and "TORCHELASTIC_RUN_ID" in os.environ:
        _report_to_torchrun(Path(file), text, rejected=isinstance(error, VLBridgeError))
    else:
        if os.environ.get("RANK", "0") != "0":
            # Another launcher terminates this rank once the first one has failed.
            time.sleep(SECONDS_FOR_FIRST_RANK)
        # Not sys.stderr: torch.distributed prefixes each line that an excepthook writes there with the rank.
        print(text, file=sys.__stderr__, flush=True)
    # W&B hooks sys.exit to mark the run as failed.
    sys.exit(1)


def _report_to_torchrun(file: Path, text: str, *, rejected: bool) -> None:
    """Write the error file, which torchrun prints for the rank that fails first, and let only one rank fail.

    Source of the format: torch/distributed/elastic/multiprocessing/errors (torch 2.13).
    """
    # First, since torchrun lists every rank terminated by a signal as a separate failure.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    extra = {"py_callstack": f"\n{text}", "timestamp": str(int(time.time()))}
    file.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
    if not rejected:
        time.sleep(SECONDS_FOR_CRASHED_RANK)
    # attempt_0/reported next to attempt_0/<local rank>/error.json
    if _first_to_report(file.parent.parent / "reported"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    else:
        time.sleep(SECONDS_UNTIL_TERMINATED)


def _first_to_report(claim: Path) -> bool:
    """Whether this rank reports for its node: local rank 0, or another rank if local rank 0 does not fail in time."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end = time.monotonic() + SECONDS_FOR_FIRST_RANK
        while time.monotonic() < end and not claim.exists():
            time.sleep(_POLL_SECONDS)
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
