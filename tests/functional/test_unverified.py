"""A setting that no test verifies is noted in the checkpoints of its run, and of the runs that continue from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlbridge.checkpoint.inspect import inspect, table_lines
from megatron_vlbridge.checkpoint.run_manifest import RUN_MANIFEST, write_run_manifest
from tests import digits_checkpoint
from tests.functional.launch import run_example

# In a model without experts they change nothing.
JITTER = ("--moe-input-jitter-eps", 0.1, "--allow-unverified", "moe_input_jitter_eps")
POLICY = ("--moe-token-drop-policy", "position", "--allow-unverified", "moe_token_drop_policy")
BOTH = ["moe_input_jitter_eps", "moe_token_drop_policy"]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., str]:
    folder = digits_checkpoint.write(tmp_path)
    common = ("--hf-folder", "hf", "--conversations", "train.jsonl", "--seq-length", 256, "--global-batch-size", 2)
    common += ("--lr", 1e-3, "--lr-decay-style", "constant", "--num-workers", 0, "--override-opt_param-scheduler")
    return lambda *arguments, **options: run_example(folder, *common, *arguments, **options)


def noted(folder: Path) -> list[Any]:
    """What `vlbridge inspect` says of a checkpoint: as JSON, and the line for people."""
    found = inspect(folder)
    lines = [line for line in table_lines(found) if "unverified" in line]
    return [found.as_json()["unverified"], lines]


@pytest.mark.layouts
def test_a_checkpoint_names_the_unverified_settings_of_its_run_and_of_those_before(
    tmp_path: Path, train: Callable[..., str]
) -> None:
    printed = train("--train-iters", 1, "--hf-weights", "--save", "run", *JITTER)
    assert printed.count("not verified equal to transformers: moe_input_jitter_eps\n") == 1
    assert noted(tmp_path / "run") == [BOTH[:1], [f"unverified settings: {BOTH[0]}"]]
    printed = train("--train-iters", 2, "--load", "run", "--save", "run", "--async-save", *POLICY)
    assert printed.count("not verified equal to transformers: moe_token_drop_policy\n") == 1
    assert noted(tmp_path / "run") == [BOTH, [f"unverified settings: {', '.join(BOTH)}"]]
    assert noted(tmp_path / "run" / "iter_0000001")[0] == BOTH[:1]


@pytest.mark.layouts
def test_every_saved_iteration_has_the_names_of_where_the_run_started(
    tmp_path: Path, train: Callable[..., str]
) -> None:
    train("--train-iters", 2, "--hf-weights", "--save", "plain", "--save-interval", 1, processes=2)
    assert noted(tmp_path / "plain") == [[], []]
    assert not list((tmp_path / "plain").glob(f"**/{RUN_MANIFEST}"))
    write_run_manifest(tmp_path / "plain" / "iter_0000002", BOTH[:1])
    start = ("--pretrained-checkpoint", "plain", "--save", "other", "--save-interval", 1)
    train("--train-iters", 2, *start, *POLICY, processes=2)
    assert [noted(tmp_path / "other" / f"iter_000000{i}")[0] for i in (1, 2)] == [BOTH, BOTH]
    # Of an iteration that is named, and without a setting of its own.
    train("--train-iters", 3, "--load", "other", "--ckpt-step", 1, "--save", "third")
    assert noted(tmp_path / "third")[0] == BOTH
    train("--train-iters", 1, "--pretrained-checkpoint", "plain", "--ckpt-step", 1, "--save", "fourth")
    assert noted(tmp_path / "fourth") == [[], []]
