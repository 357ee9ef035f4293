"""The example script: all layouts have the same loss curve, and a resumed run continues it."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoProcessor

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.data.dataset import PackedConversations, read_conversations
from megatron_vlbridge.training.metrics.columns import MEASURED
from megatron_vlbridge.training.metrics.csv_file import read_rows
from megatron_vlbridge.training.metrics.plot import plot
from tests import digits_checkpoint
from tests.cases import later
from tests.closeness import assert_close_in_norm, relative_error
from tests.functional.launch import SCRIPT, run_example
from tests.functional.pool import Pool
from tests.functional.test_arguments import said
from tests.mtp_reference import add_prediction_layer

ITERATIONS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_checkpoint.write(tmp_path_factory.mktemp("digits"))


def train(folder: Path, *arguments: object, processes: int = 1, script: Path = SCRIPT) -> list[float]:
    """The losses of a run of the example, read from its log."""
    common = ("--data", folder / "train.jsonl", "--seq-length", 256, "--micro-batch-size", 1, "--seed", 5)
    common += ("--global-batch-size", 2, "--lr", 1e-3, "--lr-decay-style", "constant", "--num-workers", 0)
    # The same packs in every layout: context parallelism needs space for its padding.
    common += ("--train-iters", ITERATIONS, "--log-interval", 1, "--pack-multiple-of", 4)
    return losses_of(run_example(folder, *common, *arguments, processes=processes, script=script))


def losses_of(output: str) -> list[float]:
    """The losses in the log of a run."""
    losses = [float(loss) for loss in re.findall(r"^iteration +\d+/\d+  loss (\S+)", output, re.MULTILINE)]
    # Megatron does not reset its mean after the first iteration of a process: the second line is the mean of two.
    return [losses[0], 2 * losses[1] - losses[0], *losses[2:]]


@pytest.fixture(scope="module")
def one_process(folder: Path) -> list[float]:
    save = ("--save", "whole", "--save-interval", ITERATIONS, "--tensorboard-dir", "tensorboard")
    save += ("--metrics-csv", "metrics.csv")
    losses = train(folder, "--hf-folder", "hf", "--hf-weights", *save)
    assert len(losses) == ITERATIONS
    assert losses[-1] < losses[0]
    return losses


def test_tensorboard_has_the_losses_of_the_log(folder: Path, one_process: list[float]) -> None:
    assert_same_curve(scalars(folder / "tensorboard", "lm loss"), one_process)


def test_the_csv_file_has_the_losses_of_the_log_and_the_values_of_tensorboard(
    folder: Path, one_process: list[float]
) -> None:
    rows = read_rows(folder / "metrics.csv")
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    losses = [row["lm_loss"] for row in rows]
    assert [losses[0], 2 * losses[1] - losses[0], *losses[2:]] == one_process
    for tag in ("supervised_tokens", "tokens", "images", "patches", "padding_share", "model_tflops_per_rank"):
        values = [row[tag] for row in rows]
        assert scalars(folder / "tensorboard", MEASURED[tag]) == pytest.approx(values, rel=1e-6)
        assert all(value > 0 for value in values)
    # The packs of the dataset, item by item; the first two lines of a process are about its first iteration too.
    processor = AutoProcessor.from_pretrained(folder / "hf")
    data = read_conversations(folder / "train.jsonl")
    sizes = {"seq_length": 256, "num_samples": 2 * ITERATIONS, "seed": 5, "multiple_of": 4}
    packs = PackedConversations(data, processor, read_config(folder / "hf"), **sizes)
    supervised = [int((packs[item]["labels"] != -100).sum()) for item in range(2 * ITERATIONS)]
    each = [sum(supervised[item : item + 2]) for item in range(0, 2 * ITERATIONS, 2)]
    expected = [each[0], (each[0] + each[1]) / 2, *each[2:]]
    assert [row["supervised_tokens"] for row in rows] == expected
    assert plot(folder / "metrics.csv").stat().st_size > 1000


def scalars(folder: Path, tag: str) -> list[float]:
    """The values of one tag, of every iteration."""
    events = EventAccumulator(str(folder))
    events.Reload()
    found = events.Scalars(tag)
    assert [scalar.step for scalar in found] == list(range(1, len(found) + 1))
    return [scalar.value for scalar in found]


def assert_same_curve(found: list[float], expected: list[float]) -> None:
    assert_close_in_norm(found, expected)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        later(2, ("--tensor-model-parallel-size", 2)),
        later(2, ("--pipeline-model-parallel-size", 2)),
        (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
        later(2, ("--context-parallel-size", 2)),
    ],
    ids=["tp2", "pp2", "dp2-overlapped", "cp2"],
)
def test_a_layout_has_the_loss_curve_of_one_process(
    folder: Path, one_process: list[float], processes: int, layout: tuple
) -> None:
    found = train(folder, "--hf-folder", "hf", "--hf-weights", *layout, processes=processes)
    assert_same_curve(found, one_process)


@pytest.mark.layouts
def test_expert_parallel_has_the_loss_curve_of_one_process(tmp_path: Path) -> None:
    folder = digits_checkpoint.write(tmp_path, experts=True)
    arguments = ("--hf-folder", "hf", "--hf-weights")
    alone = train(folder, *arguments)
    assert_same_curve(train(folder, *arguments, "--expert-model-parallel-size", 2, processes=2), alone)


@pytest.mark.layouts
def test_an_mtp_layer_on_its_own_stage_has_the_loss_curve_of_one_process(tmp_path: Path) -> None:
    """The curve would differ if the copies of the embedding did not stay equal."""
    folder = digits_checkpoint.write(tmp_path)
    add_prediction_layer(folder / "hf")
    arguments = ("--hf-folder", "hf", "--hf-weights", "--save")
    save = ("--save-interval", ITERATIONS)
    alone = train(folder, *arguments, "alone", *save)
    layout = ("--pipeline-model-parallel-size", 3, "--pipeline-model-parallel-layout", "Etttt|m|L")
    assert_same_curve(train(folder, *arguments, "split", *save, *layout, processes=3), alone)
    before = weights_of(folder / "hf")
    one, other = (
        weights_of(export_checkpoint(folder / name, folder / f"{name}-hf", like=folder / "hf"))
        for name in ("alone", "split")
    )
    assert before.keys() == one.keys() == other.keys()
    for name, start in before.items():
        moved = relative_error(start, one[name])
        assert moved > 1e-3, f"{name} was not trained"
        assert relative_error(other[name], one[name]) < 0.02 * moved, name


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.layouts
def test_bf16_with_the_distributed_optimizer_is_close(folder: Path, one_process: list[float]) -> None:
    layout = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--pipeline-model-parallel-size", 2)
    precision = ("--bf16", "--use-distributed-optimizer")
    found = train(folder, "--hf-folder", "hf", "--hf-weights", *layout, *precision, processes=4)
    # Eight bits of mantissa: the losses agree to a few thousandths, while the curve falls by more than a tenth.
    assert max(abs(a - b) / b for a, b in zip(found, one_process, strict=True)) < 5e-3
    assert one_process[-1] < 0.9 * one_process[0]


@pytest.mark.parametrize("argument", ["--pretrained-checkpoint", later("--load")])
def test_started_from_a_megatron_checkpoint(
    folder: Path, one_process: list[float], tmp_path: Path, argument: str
) -> None:
    imported = import_checkpoint(folder / "hf", tmp_path / "imported")
    layout = ("--tensor-model-parallel-size", 2)
    found = train(folder, "--hf-folder", imported / "hf", argument, imported, *layout, processes=2)
    assert_same_curve(found, one_process)


@pytest.mark.layouts
def test_resumed_run_continues(folder: Path, one_process: list[float]) -> None:
    arguments = ("--hf-folder", "hf", "--hf-weights", "--save", "plain", "--load", "plain", "--save-interval", 5)
    arguments += ("--metrics-csv", "plain.csv")
    first = train(folder, *arguments, "--exit-interval", 5)
    assert len(first) == 5
    second = train(folder, *arguments)
    assert_same_curve(first + second, one_process)
    assert [row["iteration"] for row in read_rows(folder / "plain.csv")] == list(range(1, ITERATIONS + 1))


# The example, whose rank 1 sends a signal in its fourth iteration as torchrun does: to the group of its processes.
STOPPED = """
import os, runpy, signal
from megatron_vlbridge.backends import cpu_runtime

cpu_runtime.enable()
from megatron.training import training


def train_step(*args, count=[], **kwargs):
    count.append(1)
    if len(count) == 4 and os.environ["RANK"] == "1":
        os.killpg(0, signal.{number})
    return original(*args, **kwargs)


if __name__ == "__main__":
    os.setpgid(0, 0)
    original, training.train_step = training.train_step, train_step
    runpy.run_path("{script}", run_name="__main__")
"""


@pytest.mark.parametrize("number", ["SIGTERM", later("SIGINT")])
def test_a_stopped_run_saves_and_continues(folder: Path, one_process: list[float], number: str) -> None:
    script = folder / f"{number}.py"
    script.write_text(STOPPED.format(number=number, script=SCRIPT))
    arguments = ("--hf-folder", "hf", "--hf-weights", "--save", number, "--load", number)
    arguments += ("--pipeline-model-parallel-size", 2, "--num-workers", 1)
    first = train(folder, *arguments, processes=2, script=script)
    assert len(first) == 4
    assert (folder / number / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert_same_curve(first + train(folder, *arguments, processes=2), one_process)


@pytest.mark.layouts
def test_an_asynchronously_saved_checkpoint_is_that_of_its_iteration(folder: Path, one_process: list[float]) -> None:
    """Training goes on after it; a writer that shares the weights with training would write later ones."""
    workers = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")
    saved = train(folder, "--hf-folder", "hf", "--hf-weights", "--save", "async", "--save-interval", 5, *workers)
    assert_same_curve(saved, one_process)
    resumed = train(folder, "--hf-folder", "hf", "--load", "async", "--ckpt-step", 5)
    assert_same_curve(resumed, one_process[5:])


def test_a_longer_schedule_is_rejected_before_the_model(folder: Path, one_process: list[float], pool: Pool) -> None:
    """On a checkpoint that a run saved; other values: tests/unit/test_start.py."""
    resumed = ("--hf-folder", folder / "hf", "--load", folder / "whole", "--lr-decay-style", "constant")
    assert said(pool, *resumed, "--train-iters", ITERATIONS) == "accepted"
    error = said(pool, *resumed, "--train-iters", 2 * ITERATIONS)
    assert f"saved {2 * ITERATIONS}, given {4 * ITERATIONS}" in error
    assert "--override-opt_param-scheduler" in error
