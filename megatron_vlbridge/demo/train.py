"""The training of the demo: `examples/pretrain_qwen3_vl.py` under torchrun, followed line by line."""

import re
from dataclasses import dataclass, field

from megatron_vlbridge.demo.folder import Folder
from megatron_vlbridge.demo.process import ROOT, follow
from megatron_vlbridge.demo.progress import Progress
from megatron_vlbridge.errors import VLBridgeError

SCRIPT = ROOT / "examples" / "pretrain_qwen3_vl.py"
SEQ_LENGTH = 512
PACKS_PER_ITERATION = 2
WARMUP_ITERATIONS = 20
ITERATION = re.compile(r"^iteration +\d+/\d+  loss (\S+)")


@dataclass(frozen=True)
class Recipe:
    """What a user chooses about the training."""

    tp: int
    pp: int
    iterations: int
    seed: int

    @property
    def processes(self) -> int:
        """One for each part of the model; there is no data parallelism here."""
        return self.tp * self.pp


def arguments(folder: Folder, recipe: Recipe) -> list[str]:
    """What follows `python` to run the training."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    options = {
        "hf-folder": folder.megatron_start / "hf",
        "pretrained-checkpoint": folder.megatron_start,
        "conversations": folder.data / "train.jsonl",
        "save": folder.megatron_trained,
        "ckpt-format": "torch_dist",
        "save-interval": recipe.iterations,
        "tensor-model-parallel-size": recipe.tp,
        "pipeline-model-parallel-size": recipe.pp,
        "seq-length": SEQ_LENGTH,
        "micro-batch-size": 1,
        "global-batch-size": PACKS_PER_ITERATION,
        "train-iters": recipe.iterations,
        "lr": 2e-3,
        "min-lr": 0.0,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": min(WARMUP_ITERATIONS, recipe.iterations // 2),
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

    Example:
        >>> loss_of("iteration   3/400  loss 2.500000  grad norm 0.921  5,386 tokens/s  1 min 15 s left")
        2.5
    """
    found = ITERATION.search(line)
    return float(found[1]) if found else None


def train(folder: Folder, recipe: Recipe, progress: Progress) -> list[float]:
    """Train from the imported checkpoint into `megatron_trained`; the loss of each iteration.

    Raises:
        VLBridgeError: the script is not there, the training failed, or it told fewer losses than iterations.
    """
    if not SCRIPT.is_file():
        raise VLBridgeError(f"{SCRIPT}: no such file; the demo needs the project's folder, not only its package")
    log = folder.logs / "training.log"
    progress.note(f"log: {log}")
    progress.live("Megatron starts ...")
    follower = Follower(progress)
    follow(arguments(folder, recipe), log, follower)
    if len(follower.losses) != recipe.iterations:
        raise VLBridgeError(f"{log}: expected the loss of {recipe.iterations} iterations, found {len(follower.losses)}")
    return follower.losses
