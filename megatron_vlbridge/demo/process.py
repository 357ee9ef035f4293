"""The processes of the demo: the training under torchrun, followed line by line; none outlives the demo."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from megatron_vlbridge.demo.output import Folder, Progress
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
SCRIPT = ROOT / "examples" / "pretrain.py"
SEQ_LENGTH = 512
PACKS_PER_ITERATION = 2
LORA_RANK = 16
WARMUP_ITERATIONS = 20
ITERATION = re.compile(r"^iteration +\d+/\d+  loss (\S+)")


@dataclass(frozen=True)
class Recipe:
    """What a user chooses about the training."""

    tp: int = 1
    pp: int = 1
    iterations: int = 450
    seed: int = 0
    lora: bool = False

    @property
    def processes(self) -> int:
        """One for each part of the model; there is no data parallelism here."""
        return self.tp * self.pp

    @property
    def base_iterations(self) -> int:
        """Those of all parameters: a third where adapters follow."""
        return max(1, self.iterations // 3) if self.lora else self.iterations

    @property
    def adapter_iterations(self) -> int:
        """Those of the adapters."""
        return max(1, self.iterations - self.base_iterations) if self.lora else 0


@dataclass(frozen=True)
class Training:
    """One run of the training script: its weights (as arguments), data, length, and where it saves and logs."""

    weights: tuple[object, ...]
    data: Path
    iterations: int
    learning_rate: float
    save: Path
    log: Path


def base_training(folder: Folder, recipe: Recipe) -> Training:
    """All parameters of the imported checkpoint; where adapters follow, on the base's digits alone."""
    start = folder.megatron_start
    return Training(
        weights=("--hf-folder", start / "hf", "--pretrained-checkpoint", start),
        data=folder.data / ("base.yaml" if recipe.lora else "meta.yaml"),
        iterations=recipe.base_iterations,
        learning_rate=2e-3,
        save=folder.megatron_trained,
        log=folder.logs / "training.log",
    )


def adapter_training(folder: Folder, recipe: Recipe) -> Training:
    """Adapters of the exported base, which is frozen, on all digits."""
    lora = "--lora-rank", LORA_RANK, "--lora-alpha", 2 * LORA_RANK, "--lora-vision"
    return Training(
        weights=("--hf-folder", folder.hf_trained, "--hf-weights", *lora),
        data=folder.data / "meta.yaml",
        iterations=recipe.adapter_iterations,
        learning_rate=3e-3,
        save=folder.megatron_adapters,
        log=folder.logs / "adapters.log",
    )


def arguments(training: Training, recipe: Recipe) -> list[str]:
    """What follows `python` to run a training."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    options = {
        "data": training.data,
        "save": training.save,
        "ckpt-format": "torch_dist",
        "save-interval": training.iterations,
        "tensor-model-parallel-size": recipe.tp,
        "pipeline-model-parallel-size": recipe.pp,
        "seq-length": SEQ_LENGTH,
        "micro-batch-size": 1,
        "global-batch-size": PACKS_PER_ITERATION,
        "train-iters": training.iterations,
        "lr": training.learning_rate,
        "min-lr": 0.0,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": min(WARMUP_ITERATIONS, training.iterations // 2),
        "weight-decay": 0.01,
        "adam-beta2": 0.95,
        "clip-grad": 1.0,
        # Megatron's seed must be positive.
        "seed": recipe.seed + 1,
        "num-workers": 1,
        "log-interval": 1,
    }
    flags = ["--cpu", *(["--sequence-parallel"] if recipe.tp > 1 else [])]
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    given += map(str, training.weights)
    return [*launcher, "--nproc-per-node", str(recipe.processes), str(SCRIPT), *flags, *given]


@dataclass
class Follower:
    """Collects the loss of each iteration from the training's log, and shows where the training stands."""

    progress: Progress
    losses: list[float] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        """Take one line of the log."""
        found = loss_of(line)
        if found is not None:
            self.losses.append(found)
            self.progress.live(line.rstrip())


def loss_of(line: str) -> float | None:
    """The loss (nats a token) in a line of the training's log, where there is one.

    Example: `loss_of("iteration   3/400  loss 2.500000  grad norm 0.921  5,386 tokens/s  1 min 15 s left")` is `2.5`.
    """
    found = ITERATION.search(line)
    return float(found[1]) if found else None


def train(training: Training, recipe: Recipe, progress: Progress) -> list[float]:
    """Run a training; the loss of each iteration.

    Raises VLBridgeError: the script is not there, the training failed, or its log has fewer losses than iterations.
    """
    if not SCRIPT.is_file():
        raise VLBridgeError(f"{SCRIPT}: no such file; the demo needs the project's folder, not only its package")
    log = training.log
    progress.note(f"log: {log}")
    progress.live("Megatron starts ...")
    follower = Follower(progress)
    follow(arguments(training, recipe), log, follower)
    losses = follower.losses
    if len(losses) != training.iterations:
        raise VLBridgeError(f"{log}: expected the loss of {training.iterations} iterations, found {len(losses)}")
    progress.note(f"loss {losses[0]:.3f} -> {losses[-1]:.5f}: {training.save}")
    return losses


def follow(command: Sequence[str], log: Path, on_line: Callable[[str], None] | None = None) -> None:
    """Run `python command...` to its end, writing its output to `log` and giving each line to `on_line`.

    However this is left, also by Ctrl-C, the process and its children have ended.

    Raises VLBridgeError: the process failed; with what it reported, or the end of the log.
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
    """The error message for a process that ended with `status`."""
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
