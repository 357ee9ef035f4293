"""The checks that need a GPU run here too, on the stand-in: what `ci/gpu.sh` would find wrong in Python shows here."""

import os
import re
import subprocess
from pathlib import Path

from tests import reference
from tests.te import script
from tests.te.host import ROOT


def test_every_check_passes_and_the_speed_table_is_printed(tmp_path: Path) -> None:
    tiny = reference.write_checkpoint(tmp_path / "tiny") / "config.json"
    speed = ["--config", str(tiny), "--conversations", "1", "--repeats", "1"]
    environment = os.environ | {"PYTHON": str(script.write(tmp_path / "python"))}
    command = [ROOT / "ci" / "gpu.sh", *speed]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    collected, passed = (re.search(rf"(\d+) {what}", run.stdout) for what in ("items", "passed"))
    assert collected
    assert passed
    assert collected[1] == passed[1], "a check was skipped"
    for name in ("vlm_step", "transformers, sdpa"):
        assert re.search(rf"^\| {name} \| \d+ \| [\d,]+ \| \d+ \| 0 \|$", run.stdout, re.MULTILINE), name
