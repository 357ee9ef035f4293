"""Processes that the demo starts: their output goes to a file, their failure is told, and none outlives the demo."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_vlbridge.errors import VLBridgeError

ROOT = Path(__file__).parents[2]
# All processes of the demo, this one and those that it starts.
ENVIRONMENT = {
    # A small model gains nothing from threads, and on busy cores they wait for each other at every product.
    "OMP_NUM_THREADS": "1",
    # On the CPU, also beside a GPU.
    "CUDA_VISIBLE_DEVICES": "",
    # Nothing is to be downloaded.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Longer than torchrun gives its workers to end.
SECONDS_TO_END = 40
# An exception as Python prints it; torchrun's own, which only says that a process failed, is none of interest.
ERROR_LINE = re.compile(r"^(\[rank\d+\]:)? ?(?!.*ChildFailedError)[\w.]*(Error|Exception)\b")
ERROR_LINES, TAIL = 8, 15


def follow(command: Sequence[str], log: Path, on_line: Callable[[str], None] | None = None) -> None:
    """Run `python command...` to its end, writing its output to `log` and giving each line to `on_line`.

    However this is left, also by Ctrl-C, the process and its children have ended.

    Raises:
        VLBridgeError: the process failed; with the errors that it reported and the end of the log.
    """
    # The same code as here, installed or not.
    code = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": code, "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            # A Ctrl-C of the terminal reaches this process alone, which then ends the other one in order.
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if on_line is not None:
                    on_line(line)
            status = process.wait()
        finally:
            _end(process)
    if status != 0:
        raise VLBridgeError(failure(status, log.read_text(encoding="utf-8"), log))


def failure(status: int, output: str, log: Path) -> str:
    """What to tell a person about a process that ended with `status`."""
    lines = output.splitlines()
    errors = _errors(lines)
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    parts = [f"A process {how}; its whole output: {log}"]
    if errors:
        parts += ["The errors that it reported:", *(f"  {line}" for line in errors)]
    parts += [f"The last {min(TAIL, len(lines))} lines:", *(f"  {line}" for line in lines[-TAIL:])]
    return "\n".join(parts)


def _errors(lines: Sequence[str]) -> list[str]:
    """The exceptions in a log with the rest of their message, each once, however many ranks report it."""
    found: dict[str, None] = {}
    for number, line in enumerate(lines):
        match = ERROR_LINE.match(line)
        if match is None:
            continue
        rank = match[1] or ""
        message = [line]
        # Only a rank's mark tells that the next lines belong to the message.
        for following in lines[number + 1 : number + ERROR_LINES] if rank else ():
            if not following.startswith(rank):
                break
            message.append(following)
        found.update(dict.fromkeys(part.removeprefix(rank).rstrip() for part in message))
    return list(found)[:ERROR_LINES]


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
