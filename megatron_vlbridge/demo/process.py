"""Processes that the demo starts: their output goes to a file, their failure is told, and none outlives the demo."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent

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
# What `training.failure` reports at the end of a log, in torchrun's frame or without.
REPORT = re.compile(r"^ *(?:Error: |Unexpected error on rank ).*?(?=^=+$|\Z)", re.DOTALL | re.MULTILINE)
TAIL = 15


def follow(command: Sequence[str], log: Path, on_line: Callable[[str], None] | None = None) -> None:
    """Run `python command...` to its end, writing its output to `log` and giving each line to `on_line`.

    However this is left, also by Ctrl-C, the process and its children have ended.

    Raises:
        VLBridgeError: the process failed; with what it reported, or the end of the log.
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
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    report = REPORT.search(output)
    if report is not None:
        return f"A process {how}; its whole output: {log}\n{dedent(report[0]).rstrip()}"
    lines = output.splitlines()[-TAIL:]
    return "\n".join([f"A process {how}; its whole output: {log}. Its last lines:", *(f"  {line}" for line in lines)])


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
