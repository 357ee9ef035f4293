"""However large a checkpoint is, a conversion keeps within the memory that it was given."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.hf.header import encode_header
from megatron_vlbridge.families import find
from megatron_vlbridge.weights import TensorSpec

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
LIMIT = 640 * 2**20

# Prints the largest anonymous memory above that of the bare interpreter, in bytes.
SCRIPT = """
import re, sys, threading
from pathlib import Path
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
start, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.stream.engine import Options
options = Options(memory=int(sys.argv[1]))
import_checkpoint("hf", "megatron", options=options)
export_checkpoint("megatron", "back", options=options)
export_checkpoint("megatron", "fp8", fp8=True, options=options)
done.set()
watcher.join()
print(peak - start)
"""


def write_zeros(folder: Path, name: str, layers: int) -> int:
    """A checkpoint of these shapes whose numbers are a hole in its file; gives its bytes."""
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    values["text_config"]["num_hidden_layers"] = layers
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    config = read_config(folder)
    specs = {key: TensorSpec(shape, torch.bfloat16) for key, shape in find(config).table(config).hf_shapes.items()}
    header, nbytes = encode_header(specs), sum(spec.nbytes for spec in specs.values())
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + nbytes)
    return nbytes


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "layers", "at_least"),
    [("Qwen3-VL-2B-Instruct", 3, 1.5e9), ("Qwen3-VL-8B-Instruct", 3, 4e9), ("Qwen3-VL-30B-A3B-Instruct", 3, 4e9)],
)
def test_a_conversion_keeps_within_its_memory(tmp_path: Path, name: str, layers: int, at_least: float) -> None:
    assert write_zeros(tmp_path / "hf", name, layers) > at_least
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(LIMIT)], cwd=tmp_path, capture_output=True, text=True)
    shutil.rmtree(tmp_path)
    assert run.returncode == 0, run.stderr
    assert 0 < int(run.stdout.split()[-1]) <= LIMIT
