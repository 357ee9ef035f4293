"""A run with frozen parts and learning rates of parts: saved, resumed and exported, in layouts and with options."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_vlbridge.checkpoint.convert import export_checkpoint
from tests import digits_checkpoint
from tests.closeness import assert_close_in_norm
from tests.functional.pool import Pool
from tests.functional.test_arguments import said
from tests.functional.test_freeze import part, weights_of
from tests.functional.test_training import ITERATIONS, train

ARGUMENTS = ("--hf-folder", "hf", "--hf-weights", "--freeze", "vision", "embedding", "--merger-lr-mult", 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_checkpoint.write(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def straight(folder: Path) -> SimpleNamespace:
    """The losses of a run that nothing interrupts, and its exported weights."""
    losses = train(folder, *ARGUMENTS, "--save", "straight")
    saved = dist_checkpointing.load_common_state_dict(str(folder / "straight" / f"iter_{ITERATIONS:07}"))
    assert {group["lr"] for group in saved["optimizer"]["param_groups"]} == {1e-3, 0.5e-3}
    return SimpleNamespace(losses=losses, weights=exported(folder, "straight"))


def exported(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights that a run saved; the frozen ones must be those that it started from, bit for bit."""
    weights = weights_of(export_checkpoint(folder / name, folder / f"{name}-hf", like=folder / "hf"))
    before = weights_of(folder / "hf")
    assert weights.keys() == before.keys()
    for key, x in before.items():
        assert torch.equal(weights[key], x) == (part(key) in ("vision", "embedding")), key
    return weights


@pytest.mark.layouts
def test_a_resumed_run_with_frozen_parts_continues(folder: Path, straight: SimpleNamespace, pool: Pool) -> None:
    resumed = (*ARGUMENTS, "--save", "resumed", "--load", "resumed", "--save-interval", 5)
    first = train(folder, *resumed, "--exit-interval", 5)
    assert len(first) == 5
    other_parts_are_rejected(folder, pool)
    assert_close_in_norm(first + train(folder, *resumed), straight.losses)
    weights = exported(folder, "resumed")
    for name, x in straight.weights.items():
        assert torch.equal(weights[name], x), name


def other_parts_are_rejected(folder: Path, pool: Pool) -> None:
    start = ("--hf-folder", folder / "hf", "--load", folder / "resumed", "--lr-decay-style", "constant")
    start += ("--train-iters", 10)
    same = ("--freeze", "embedding", "vision", "--merger-lr-mult", 0.5)
    assert said(pool, *start, *same) == "accepted"
    answer = said(pool, *start, "--freeze", "vision", "--merger-lr-mult", 0.5)
    assert "was saved with --freeze vision embedding, and this run is with --freeze vision:" in answer
    assert "this run is with nothing frozen" in said(pool, *start, "--merger-lr-mult", 0.5)
    answer = said(pool, *start, *same[:3], "--merger-lr-mult", 0.25)
    assert "multipliers {'merger': 0.5}, and this run has {'merger': 0.25}" in answer
    assert said(pool, *start, "--no-load-optim", "--no-load-rng") == "accepted"


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
        (2, ("--pipeline-model-parallel-size", 2)),
        (2, ("--pipeline-model-parallel-size", 2, "--use-distributed-optimizer", "--overlap-grad-reduce")),
        (2, ("--context-parallel-size", 2, "--overlap-grad-reduce")),
        (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
    ],
    ids=["dp2-distributed", "pp2", "pp2-distributed", "cp2", "tp2-sp"],
)
def test_layouts_with_frozen_parts_have_the_loss_curve_of_one_process(
    folder: Path, straight: SimpleNamespace, processes: int, layout: tuple[object, ...]
) -> None:
    name = "-".join(map(str, layout)).replace("--", "")
    assert_close_in_norm(train(folder, *ARGUMENTS, "--save", name, *layout, processes=processes), straight.losses)
    exported(folder, name)
