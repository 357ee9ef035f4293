"""Whole runs: packs without supervised tokens change nothing, a NaN ends a run, a resumed run continues its file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge.checkpoint.convert import export_checkpoint
from megatron_vlbridge.training.metrics.csv_file import read_rows
from tests import reference
from tests.functional.launch import run_script
from tests.mtp_reference import add_prediction_layer

pytestmark = pytest.mark.layouts

SCRIPT = """
import os
from megatron_vlbridge.backends import cpu_runtime
cpu_runtime.enable()
import torch
from megatron_vlbridge.training.pretrain import parse_arguments, run
from tests import reference

class Packs(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pack = reference.pack([reference.conversation(kind, index) for kind in ("image", "text")], 64)
        if os.path.exists("unsupervised"):
            pack["labels"].fill_(-100)
        if index == 5 and os.path.exists("nan"):
            pack["pixel_values"][0, 0] = float("nan")
        return pack

if __name__ == "__main__":
    run(parse_arguments(), lambda counts: (Packs(counts[0]), Packs(counts[1]), None))
"""
COMMON = ("--cpu", "--seq-length", 64, "--lr", 1e-3, "--train-iters", 4, "--global-batch-size", 2, "--num-workers", 0)
COMMON += ("--hf-folder", "hf", "--log-interval", 1, "--eval-iters", 1, "--metrics-csv", "metrics.csv", "--save", "run")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.parametrize("kind", ["mtp", "router losses"])
def test_without_supervised_tokens_the_loss_is_zero_and_no_weight_changes(script: Path, kind: str) -> None:
    folder = script.parent
    (folder / "unsupervised").touch()
    experts = {} if kind == "router losses" else None
    reference.write_checkpoint(folder / "hf", experts=experts)
    options: tuple[object, ...] = ("--hf-weights", "--weight-decay", 0)
    if kind == "mtp":
        add_prediction_layer(folder / "hf")
    else:
        options += ("--moe-aux-loss-coeff", 0.5, "--moe-z-loss-coeff", 0.1, "--use-distributed-optimizer")
    codes, output, errors = run_script(script, folder, *COMMON, *options, processes=1 if kind == "mtp" else 2)
    assert not any(codes), errors[-3000:]
    assert "nan" not in output
    assert output.count("loss 0.000000") == 5 + 4 * (kind == "mtp")
    assert "validation loss 0.000000" in output
    for row in read_rows(folder / "metrics.csv"):
        assert row["lm_loss"] == row["supervised_tokens"] == row["grad_norm"] == 0
        assert row.get("mtp_loss") == (0 if kind == "mtp" else None)
        assert (row.get("load_balancing_loss", 0) > 0) == (row.get("z_loss", 0) > 0) == (kind != "mtp")
    before = weights_of(folder / "hf")
    after = weights_of(export_checkpoint(folder / "run", folder / "exported", like=folder / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_a_nan_ends_the_run_before_an_update_and_a_resumed_run_replaces_its_rows(script: Path) -> None:
    """Megatron's own check of gradients is part of their reduction, which is under way when the losses are checked."""
    folder = script.parent
    reference.write_checkpoint(folder / "hf")
    options = ("--hf-weights", "--load", "run", "--save-interval", 1, "--overlap-grad-reduce")
    (folder / "nan").touch()
    codes, output, errors = run_script(script, folder, *COMMON, *options, processes=2)
    assert all(codes)
    assert "Error: iteration 3: micro-batch 0 of data-parallel rank 1, item 5 of the training dataset" in errors
    assert "All weights are finite" in errors
    assert "checkpoint saved at iteration 2" in output
    assert (folder / "run" / "latest_checkpointed_iteration.txt").read_text() == "2"
    before = read_rows(folder / "metrics.csv")
    assert [row["iteration"] for row in before] == [1, 2]
    (folder / "nan").unlink()
    codes, output, errors = run_script(script, folder, *COMMON, *options, "--ckpt-step", 1, processes=2)
    assert not any(codes), errors[-3000:]
    rows = read_rows(folder / "metrics.csv")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] == before[0]
    # The first row of a process is about its first iteration, the second about the first two.
    assert rows[1]["lm_loss"] == pytest.approx(2 * before[1]["lm_loss"] - before[0]["lm_loss"], rel=1e-5)
