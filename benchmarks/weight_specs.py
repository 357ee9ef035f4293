"""The names, shapes and dtypes of an export, from the config alone: seconds for the largest models.

    python benchmarks/weight_specs.py

As `hf_weight_specs` gives them, in one process without a process group: fused experts in bfloat16, and single experts
in FP8. Each is the median of five; reading the config is included. Exit code 1 if Qwen3-VL-235B-A22B takes 2 s or more.
"""

import statistics
import sys
import time
from pathlib import Path

from megatron_vlbridge import hf_weight_specs, read_config

CONFIGS = Path(__file__).parents[1] / "tests" / "data" / "configs"
LIMITED, LIMIT = "Qwen3-VL-235B-A22B-Instruct", 2.0
MODELS = ("Qwen3-VL-8B-Instruct", LIMITED, "Qwen3.5-397B-A17B")
ROUNDS = 5


def measure(model: str, fp8: bool) -> tuple[int, float]:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        specs = hf_weight_specs(read_config(CONFIGS / f"{model}.json"), dtype="bfloat16", fp8=fp8)
        times.append(time.perf_counter() - begin)
    return len(specs), statistics.median(times)


def main() -> int:
    slow = False
    for model in MODELS:
        for fp8 in (False, True):
            count, seconds = measure(model, fp8)
            print(f"{model}{', FP8' if fp8 else ''}: {count} tensors, {seconds:.2f} s")
            slow |= model == LIMITED and seconds >= LIMIT
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
