"""How long a run with many images takes to start: from torchrun to its first iteration, with a table of lengths.

    python benchmarks/data_start.py [--conversations 60000] [--processes 4] [--no-table]

Writes conversations with one JPEG of 256 x 256 each (one file, linked under as many names) and a small model to the
folder for temporary files, runs `vlbridge data index` on them, and then the example on CPU processes, TP 2 x PP 2 where
there are four, with `--distributed-timeout-minutes 1`. Prints the seconds of both, and those of the same run with 100
conversations. Exit code 1 if the run with all of them takes 60 s or more to its first iteration. With `--no-table`
there is no `index`: the ranks measure all conversations, longer than the timeout if there are enough of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vlbridge.demo.start import write_checkpoint

ROOT = Path(__file__).parents[1]
LIMIT_S = 60
FEW = 100


def write(folder: Path, count: int) -> Path:
    """Conversations with one image each."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    first = folder / "images" / "0.jpg"
    first.parent.mkdir()
    Image.fromarray(noise).save(first)
    with (folder / "train.jsonl").open("w") as lines:
        for index in range(count):
            file = folder / "images" / f"{index}.jpg"
            if index:
                os.link(first, file)
            parts = [{"type": "image", "image": f"images/{file.name}"}, {"type": "text", "text": f"Number {index}?"}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three"}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return folder / "train.jsonl"


def index(folder: Path, data: Path) -> float:
    """Seconds of `vlbridge data index`."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "megatron_vlbridge.cli", "data", "index", data, "--hf-folder", folder / "hf"]
    subprocess.run([*map(str, command), "--workers", str(os.cpu_count())], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def start(folder: Path, data: Path, processes: int) -> float:
    """Seconds from torchrun to the line of the first iteration."""
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"] if processes == 4 else []
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    run += [str(ROOT / "examples" / "pretrain.py"), "--cpu", "--hf-folder", str(folder / "hf"), "--hf-weights"]
    run += ["--data", str(data), "--seq-length", "1024", "--micro-batch-size", "1", "--global-batch-size", "2"]
    run += ["--train-iters", "2", "--lr", "1e-4", "--lr-decay-style", "constant", "--log-interval", "1", *layout]
    run += ["--distributed-timeout-minutes", "1"]
    begin = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if line.startswith("iteration"):
                seconds = time.perf_counter() - begin
                process.communicate()
                if process.returncode == 0:
                    return seconds
    sys.exit("".join(output[-40:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=60_000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--no-table", action="store_true")
    args = parser.parse_args()
    seconds = {}
    for count in (FEW, args.conversations):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(folder / "hf", seed=0)
            data = write(folder, count)
            indexed = "not indexed" if args.no_table else f"indexed in {index(folder, data):.0f} s"
            seconds[count] = start(folder, data, args.processes)
        print(f"{count:,} conversations: {indexed}, first iteration after {seconds[count]:.0f} s", flush=True)
    if args.no_table:
        return 0
    return 0 if seconds[args.conversations] < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
