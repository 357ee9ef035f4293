"""The random values of a test depend only on its name, not on other tests or the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONSTANTS = f"NUMBERS = {[10**6 + n for n in range(500)]}\nWORDS = {[f'word{n}' for n in range(500)]}\n"
TESTS = """
import random

import numpy, pytest, torch
from hypothesis import given
from hypothesis import strategies as st


def values():
    return random.random(), numpy.random.rand(), torch.rand(()).item()


@pytest.fixture(scope="module")
def shared():
    return values()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_drawn(number, shared):
    print(f"\\ndrawn {number}", shared, values())


def test_imports_a_module():
    import constants

    print("\\ndrawn", values())


@given(st.integers(), st.text())
def test_examples(number, text):
    print(f"\\ndrawn {number} {text!r}", values())
"""


def drawn(folder: Path, hash_seed: int, *tests: str) -> list[str]:
    """The sorted lines that these tests print."""
    command = [sys.executable, "-m", "pytest", "-s", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", "--rootdir", str(folder), *tests]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": f"{ROOT}:{folder}"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    return sorted(line for line in run.stdout.splitlines() if line.startswith("drawn"))


@pytest.mark.layouts
def test_two_runs_draw_the_same_values_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "constants.py").write_text(CONSTANTS)
    (tmp_path / "test_file.py").write_text(TESTS)
    names = ["examples", "imports_a_module", "drawn[1]", "drawn[2]", "drawn[3]"]
    tests = [f"test_file.py::test_{name}" for name in names]
    once = drawn(tmp_path, 1, *tests)
    assert len(set(once)) > 50
    assert drawn(tmp_path, 2, *tests[::-1]) == once
