"""The checks that need a GPU run here too, on the stand-in: what `ci/gpu.sh` would find wrong in Python shows here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import reference

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Python starts with the stand-in, in processes that the checks start too."""
    (tmp_path / "sitecustomize.py").write_text("import tests.te.as_gpu\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"}


def test_every_check_passes_and_the_speed_table_is_printed(environment: dict[str, str], tmp_path: Path) -> None:
    tiny = reference.write_checkpoint(tmp_path / "tiny") / "config.json"
    speed = ["--config", str(tiny), "--conversations", "1", "--repeats", "1"]
    run = subprocess.run(
        [ROOT / "ci" / "gpu.sh", *speed], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    collected, passed = (re.search(rf"(\d+) {what}", run.stdout) for what in ("items", "passed"))
    assert collected
    assert passed
    assert collected[1] == passed[1], "a check was skipped"
    for name in ("vlm_step", "transformers, sdpa"):
        assert re.search(rf"^\| {name} \| \d+ \| [\d,]+ \| \d+ \| 0 \|$", run.stdout, re.MULTILINE), name
