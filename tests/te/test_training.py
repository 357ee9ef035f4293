"""`pretrain` on the TE backend, through the example: losses and gradient norms are the CPU backend's.

With Megatron's default fusions, FusedAdam and the multi-tensor operations of Transformer Engine's Python.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import digits_checkpoint
from tests.closeness import FP32, assert_close_in_norm, relative_error
from tests.te import launcher

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
ITERATIONS, HALF = 6, 3
BACKENDS = {"cpu": ("--cpu",), "te": ("--distributed-backend", "gloo")}
START = ("--hf-weights",)
SHARDED = ("--use-distributed-optimizer",)
OVERLAPPED = (*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather")
TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
CP2 = ("--context-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
EP2 = ("--expert-model-parallel-size", 2)
# Megatron's own workers write: each rank spawns a process that imports Megatron.
WORKERS = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")


@dataclass(frozen=True)
class Curve:
    """Losses and gradient norms of the iterations of a run, as Megatron gives them to TensorBoard in fp32."""

    losses: list[float]
    norms: list[float]

    def after(self, iteration: int) -> "Curve":
        """Without the first iterations."""
        return Curve(self.losses[iteration:], self.norms[iteration:])


@dataclass(frozen=True)
class Runs:
    """Runs of the example in a folder with conversations."""

    folder: Path

    def train(self, backend: str, name: str, *arguments: object, processes: int = 1) -> tuple[Curve, set[str]]:
        """Train on the folder's conversations; what is not in `arguments` is the same in all runs."""
        common = ("--hf-folder", "hf", "--conversations", "train.jsonl", "--seq-length", 256, "--global-batch-size", 2)
        common += ("--lr", 1e-3, "--lr-decay-style", "constant", "--train-iters", ITERATIONS, "--seed", 5)
        # The same packs under every layout: context parallelism needs room in them for its padding.
        common += ("--pack-multiple-of", 4, "--log-interval", 1, "--tensorboard-dir", f"{name}-events")
        command = (*common, *BACKENDS[backend], *arguments)
        called = launcher.run(backend, SCRIPT, self.folder, *command, processes=processes)
        events = EventAccumulator(str(self.folder / f"{name}-events"))
        events.Reload()
        losses, norms = ([entry.value for entry in events.Scalars(tag)] for tag in ("lm loss", "grad-norm"))
        return Curve(losses, norms), called


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(digits_checkpoint.write(tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(digits_checkpoint.write(tmp_path_factory.mktemp("experts"), experts=True))


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(digits_checkpoint.write(tmp_path_factory.mktemp("linear"), linear=True))


@pytest.fixture(scope="module")
def cpu(dense: Runs) -> Curve:
    curve, _ = dense.train("cpu", "cpu", *START, "--save", "cpu", "--save-interval", HALF)
    assert len(curve.losses) == len(curve.norms) == ITERATIONS
    assert curve.losses[-1] < 0.9 * curve.losses[0]
    return curve


@pytest.fixture(scope="module")
def cpu_bf16(dense: Runs) -> Curve:
    return dense.train("cpu", "cpu-bf16", *START, "--bf16")[0]


@pytest.fixture(scope="module")
def te(dense: Runs) -> tuple[Curve, set[str]]:
    return dense.train("te", "te", *START, "--save", "te", "--save-interval", HALF, *WORKERS)


@pytest.fixture(scope="module")
def sharded(dense: Runs) -> Curve:
    save = ("--save", "sharded", "--save-interval", HALF)
    return dense.train("te", "sharded", *START, *save, *TP2, *SHARDED, processes=2)[0]


def assert_same(found: Curve, expected: Curve) -> None:
    """The bound is that of layouts among themselves, which also sum in another order.

    An error in one iteration's gradients of that size is one of the next iteration's weights.
    """
    assert len(found.losses) == len(found.norms) == len(expected.losses)
    assert_close_in_norm(found.losses, expected.losses)
    assert_close_in_norm(found.norms, expected.norms)


def test_one_process_follows_the_cpu_backend(te: tuple[Curve, set[str]], cpu: Curve) -> None:
    curve, called = te
    assert_same(curve, cpu)
    assert {"multi_tensor_adam", "multi_tensor_l2norm", "multi_tensor_scale_tensor"} <= called
    assert "wgrad_gemm_accum_fp32" in called, "gradient accumulation was not fused"


def test_tensor_parallel_with_the_distributed_optimizer_follows_the_cpu_backend(sharded: Curve, cpu: Curve) -> None:
    assert_same(sharded, cpu)


@pytest.mark.parametrize(("name", "layout"), [("cp2-overlapped", (*CP2, *OVERLAPPED)), ("pp2", PP2)])
def test_a_layout_follows_the_cpu_backend(dense: Runs, cpu: Curve, name: str, layout: tuple[object, ...]) -> None:
    curve, _ = dense.train("te", name, *START, *layout, processes=2)
    assert_same(curve, cpu)


def test_grouped_experts_follow_the_cpu_backend(experts: Runs) -> None:
    expected, _ = experts.train("cpu", "cpu", *START)
    curve, called = experts.train("te", "te", *START, *EP2, *OVERLAPPED, processes=2)
    assert_same(curve, expected)
    assert "te_general_grouped_gemm" in called


def test_linear_attention_follows_the_cpu_backend(linear: Runs) -> None:
    expected, _ = linear.train("cpu", "cpu", *START)
    curve, called = linear.train("te", "te", *START, *CP2, *SHARDED, processes=2)
    assert_same(curve, expected)
    assert {"l2norm", "causal_conv1d", "chunk_gated_delta_rule"} <= called


def test_a_resumed_run_goes_on_where_it_was(dense: Runs, te: tuple[Curve, set[str]]) -> None:
    curve, _ = dense.train("te", "resumed", "--load", "te", "--ckpt-step", HALF)
    assert curve == te[0].after(HALF)


def test_a_resumed_run_of_the_distributed_optimizer_goes_on_where_it_was(dense: Runs, sharded: Curve) -> None:
    curve, _ = dense.train(
        "te", "sharded-resumed", "--load", "sharded", "--ckpt-step", HALF, *TP2, *SHARDED, processes=2
    )
    assert curve == sharded.after(HALF)


@pytest.mark.parametrize(("writer", "reader"), [("te", "cpu"), ("cpu", "te")])
def test_a_backend_continues_the_run_of_the_other(
    dense: Runs, te: tuple[Curve, set[str]], cpu: Curve, writer: str, reader: str
) -> None:
    """With the state of the optimizer; without it the curve is another one."""
    curve, _ = dense.train(reader, f"{writer}-{reader}", "--load", writer, "--ckpt-step", HALF)
    assert_same(curve, cpu.after(HALF))


def test_the_distributed_optimizer_of_the_other_backend_is_rejected(dense: Runs, sharded: Curve) -> None:
    """Its state has the order of the parameters, which differs."""
    load = ("--load", "sharded", "--ckpt-step", HALF, *TP2, *SHARDED)
    with pytest.raises(AssertionError, match="was saved on GPUs, and this run is on the CPU"):
        dense.train("cpu", "sharded-cpu", *load, processes=2)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("bf16-tp2-sharded", (*TP2, *SHARDED)), ("bf16-cp2-overlapped", (*CP2, "--cp-comm-type", "a2a", *OVERLAPPED))],
)
def test_bf16_is_as_near_to_fp32_as_on_the_cpu_backend(
    dense: Runs, cpu: Curve, cpu_bf16: Curve, name: str, layout: tuple[object, ...]
) -> None:
    """Both round after each operation, though not after the same ones: errors are of one size, not equal."""
    save = ("--save", name, "--save-interval", HALF)
    curve, _ = dense.train("te", name, *START, "--bf16", *layout, *save, processes=2)
    error, bound = relative_error(curve.losses, cpu.losses), 2 * relative_error(cpu_bf16.losses, cpu.losses)
    assert FP32 < error < bound
    load = ("--load", name, "--ckpt-step", HALF)
    resumed, _ = dense.train("te", f"{name}-resumed", *load, "--bf16", *layout, processes=2)
    assert resumed == curve.after(HALF)
