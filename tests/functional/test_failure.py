"""The output of a failing script, with and without torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = "a.jsonl, line 3: no assistant message\nAdd one"
SCRIPT = f"""
import os, sys, time
from megatron_vlbridge.training import failure
failure.report_failures()
failure.SECONDS_FOR_FIRST_RANK = 0.5 if sys.argv[1] == "one" else 60.0
from megatron_vlbridge.errors import VLBridgeError
if sys.argv[1] == "defect":
    1 / 0
if sys.argv[1] == "one" and os.environ["RANK"] == "0":
    time.sleep(100)
raise VLBridgeError({TEXT!r})
"""


def output(*command: object) -> list[str]:
    """The lines that a failing command prints to stdout and stderr, in order."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout
    return run.stdout.splitlines()


def torchrun(*command: object) -> list[str]:
    lines = output("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command)
    # The border of torchrun's report.
    assert set(lines[-1]) == {"="}
    return [line.strip() for line in lines[:-1]]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("ranks", ["all", "one"])
def test_torchrun_prints_the_message_once_for_any_number_of_failing_ranks(script: Path, ranks: str) -> None:
    lines = torchrun(script, ranks)
    assert lines[-2:] == f"Error: {TEXT}".splitlines()
    assert sum("no assistant message" in line for line in lines) == 1
    # That of torchrun.
    assert sum("Traceback" in line for line in lines) == 1


def test_torchrun_prints_the_traceback_of_one_rank(script: Path) -> None:
    lines = torchrun(script, "defect")
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert sum("ZeroDivisionError" in line for line in lines) == 1
    assert sum("Unexpected error on rank" in line for line in lines) == 1


def test_without_torchrun_only_the_message_is_printed(script: Path) -> None:
    assert output(script, "all") == f"Error: {TEXT}".splitlines()


def test_the_example_prints_only_the_error(tmp_path: Path) -> None:
    """Its imports and Megatron print nothing."""
    lines = output(ROOT / "examples" / "pretrain.py", "--cpu", "--hf-folder", tmp_path)
    assert lines[0].startswith("Error: ")
    assert "config.json" in lines[0]
    assert len(lines) == 1


def test_no_process_outlives_a_rank_that_is_killed() -> None:
    script = (
        "import os, signal\n"
        "from megatron_vlbridge.backends import cpu_runtime\n"
        "cpu_runtime.enable()\n"
        "from megatron_vlbridge.backends import cpu_saving\n"
        "cpu_saving.install()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Ends when no process holds the pipe of its output any more.
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, timeout=120, check=False
    )
    assert run.returncode == -signal.SIGKILL
