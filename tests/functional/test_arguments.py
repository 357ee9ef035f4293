"""What the command line may not say, and what Megatron would have said to it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vlbridge.errors import VLBridgeError
from tests import reference
from tests.functional.launch import SCRIPT, run_script
from tests.functional.pool import Layout, Pool

ROOT = Path(__file__).parents[2]
COMPLETE = ("--seq-length", "64", "--lr", "1e-3", "--train-iters", "4", "--global-batch-size", "2")


def refusal(layout: Layout, arguments: list[str]) -> str:
    """What `parse_arguments` says to these arguments."""
    from megatron.training.global_vars import unset_global_variables

    from megatron_vlbridge.training.pretrain import parse_arguments

    saved, sys.argv = sys.argv, ["pretrain", *COMPLETE, *arguments]
    try:
        parse_arguments()
    except VLBridgeError as error:
        return str(error)
    finally:
        sys.argv = saved
        unset_global_variables()
    return "accepted"


def said(pool: Pool, *arguments: object) -> str:
    answer: str = pool.run(refusal, Layout(), arguments=[str(argument) for argument in arguments])[0]
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize(
    ("arguments", "stated"),
    [
        (["--num-layers", "5"], "--num-layers is 5, but"),
        (["--video-min-pixels", "0"], "--video-min-pixels is 0, expected at least 1"),
        (["--video-fps", "0"], "video_fps: expected a positive number, found 0.0"),
        (["--min-pixels", "9", "--max-pixels", "8"], "min_pixels: expected at most max_pixels 8, found 9"),
        (["--num-experts", "8"], "--num-experts is 8, but"),
        (["--num-query-groups", "3"], "--num-query-groups is 3, but"),
        (["--norm-epsilon", "0.1"], "--norm-epsilon is 0.1, but"),
        (["--position-embedding-type", "rope"], "--position-embedding-type is rope, but"),
        (["--rotary-base", "77"], "--rotary-base is 77, but"),
        (["--hidden-size", "128"], "--hidden-size is 128, but"),
        (["--micro-batch-size", "2"], "a micro-batch is one pack"),
        (["--mtp-num-layers", "1"], "--mtp-num-layers is 1, but"),
        (["--use-megatron-fsdp"], "--use-megatron-fsdp is not verified"),
        (["--use-torch-fsdp2"], "--use-torch-fsdp2 is not verified"),
        (["--main-grads-dtype", "bf16"], "--main-grads-dtype is not verified"),
        (["--optimizer", "muon"], "splits the vision tower's linear_qkv.weight by the language model's heads"),
        (["--optimizer", "lion"], "--optimizer is not verified"),
        (["--ckpt-format", "torch"], "--ckpt-format torch is not verified"),
        (["--non-persistent-ckpt-type", "global"], "--non-persistent-ckpt-type is not verified"),
        (["--yaml-cfg", "nowhere.yaml"], "--yaml-cfg is not verified"),
        (["--use-checkpoint-args"], "--use-checkpoint-args is not verified"),
        (["--account-for-loss-in-pipeline-split"], "--account-for-loss-in-pipeline-split is not verified"),
        # Before the model: sizes, settings, and what Megatron says itself, also where it says nothing or ends with 0.
        (["--tensor-model-parallel-size", "3"], "does not divide the 4 attention heads"),
        (["--qk-l2-norm"], "qk_l2_norm=True, verified: "),
        (["--overlap-param-gather"], "Megatron rejects these arguments: --overlap-param-gather only supported with"),
        (["--fp16", "--bf16"], "Megatron rejects these arguments: assert not args.bf16 (arguments.py, line "),
        (["--lr-decay-style", "WSD"], "Megatron rejects these arguments: assert self.wsd_decay_steps is not None"),
        (["--checkpoint-activations"], "--checkpoint-activations is not verified"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_contradiction_is_refused(pool: Pool, folder: Path, arguments: list[str], stated: str) -> None:
    assert stated in said(pool, "--hf-folder", folder, "--random-weights", *arguments)


def test_an_unverified_setting_runs_only_where_it_is_named(pool: Pool, folder: Path) -> None:
    start = ("--hf-folder", folder, "--random-weights")
    allowed = (*start, "--allow-unverified", "fp32_residual_connection")
    assert "fp32_residual_connection=True" in said(pool, *start, "--bf16", "--fp32-residual-connection")
    assert said(pool, *allowed, "--bf16", "--fp32-residual-connection") == "accepted"
    assert "nothing that is rejected has the name fp32_residual_connection" in said(pool, *allowed, "--bf16")


def test_sums_of_gradients_in_bf16_are_accepted(pool: Pool, folder: Path) -> None:
    assert said(pool, "--hf-folder", folder, "--random-weights", "--bf16", "--grad-reduce-in-bf16") == "accepted"


def test_an_argument_that_is_no_field_of_the_model_is_admitted_by_its_name_too(pool: Pool, folder: Path) -> None:
    start = ("--hf-folder", folder, "--random-weights")
    for name, arguments in {
        "use_torch_fsdp2": ["--use-torch-fsdp2", "--no-gradient-accumulation-fusion"],
        "main_grads_dtype": ["--main-grads-dtype", "bf16"],
        "optimizer": ["--optimizer", "lion"],
    }.items():
        assert f"(To run it all the same: --allow-unverified {name})" in said(pool, *start, *arguments)
        assert "is not verified" not in said(pool, *start, *arguments, "--allow-unverified", name)
    split = ("--account-for-loss-in-pipeline-split",)
    name = "account_for_loss_in_pipeline_split"
    assert f"--allow-unverified {name},fp16)" in said(pool, *start, *split, "--allow-unverified", "fp16")
    assert said(pool, *start, *split, "--allow-unverified", name) == "accepted"
    # What is known not to work.
    for arguments in (["--optimizer", "dist_muon"], ["--use-checkpoint-args"], ["--ckpt-format", "torch"]):
        answer = said(pool, *start, *arguments, "--allow-unverified", "optimizer,use_checkpoint_args,ckpt_format")
        assert "is not verified" in answer
        assert "To run it all the same" not in answer
    assert f"has the name {name}" in said(pool, *start, "--allow-unverified", name)


def test_the_checkpoint_s_folder_is_named(pool: Pool, tmp_path: Path) -> None:
    assert "--hf-folder is missing" in said(pool, "--random-weights")
    assert "--hf-foldr: no such argument; did you mean --hf-folder?" in said(pool, "--hf-foldr", tmp_path)
    assert "expected a folder or the id of a Hub" in said(pool, "--hf-folder", tmp_path / "nowhere")
    assert "config.json" in said(pool, "--hf-folder", tmp_path)


def test_a_run_says_which_weights_it_starts_from(pool: Pool, folder: Path, tmp_path: Path) -> None:
    """All sources: tests/unit/test_start.py."""
    start = ("--hf-folder", folder)
    assert "do not say which weights to start from" in said(pool, *start)
    first = ("--load", tmp_path, "--save", tmp_path)
    assert f"--load {tmp_path}: expected a Megatron checkpoint" in said(pool, *start, *first)
    assert said(pool, *start, *first, "--hf-weights") == "accepted"


def save_schedule(layout: Layout, folder: Path, arguments: list[str]) -> None:
    """The common part of a checkpoint that a run with these arguments saves."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
    from megatron.training.global_vars import unset_global_variables

    from megatron_vlbridge.training.launch import start
    from megatron_vlbridge.training.pretrain import parse_arguments

    saved, sys.argv = sys.argv, ["pretrain", *COMPLETE, *arguments]
    try:
        args = parse_arguments()
        state: dict[str, Any] = {"opt_param_scheduler": start.schedule(args), "args": args}
    finally:
        sys.argv = saved
        unset_global_variables()
    (folder / "iter_0000004").mkdir(parents=True)
    get_write_results_queue(mp_mode="fork")  # otherwise the save starts an interpreter, which takes seconds
    dist_checkpointing.save(state, str(folder / "iter_0000004"))
    (folder / "latest_checkpointed_iteration.txt").write_text("4")


def test_another_schedule_is_refused_before_the_model(pool: Pool, folder: Path, tmp_path: Path) -> None:
    """Megatron ends in an assertion after it built the model and loaded its weights."""
    start = ["--hf-folder", str(folder)]
    pool.run(save_schedule, Layout(), folder=tmp_path / "saved", arguments=[*start, "--random-weights"])
    resumed = (*start, "--load", tmp_path / "saved")
    assert said(pool, *resumed) == "accepted"
    answer = said(pool, *resumed, "--train-iters", 10, "--weight-decay", 0.2)
    for stated in (
        "--lr-decay-iters (default: --train-iters) x --global-batch-size: saved 8, given 20",
        "--train-iters x --global-batch-size: saved 8, given 20",
        "--start-weight-decay (default: --weight-decay): saved 0.01, given 0.2",
        "--override-opt_param-scheduler",
    ):
        assert stated in answer
    assert "--lr:" not in answer
    assert said(pool, *resumed, "--train-iters", 10, "--override-opt_param-scheduler") == "accepted"
    assert said(pool, *resumed, "--train-iters", 10, "--finetune") == "accepted"
    # Other frozen parts (tests/unit/test_parts.py).
    assert "this run is with --freeze vision" in said(pool, *resumed, "--freeze", "vision")


def test_help_of_the_example_lists_all_arguments(tmp_path: Path) -> None:
    exit_codes, output, errors = run_script(SCRIPT, tmp_path, "--cpu", "--help")
    assert exit_codes == [0], errors[-2000:]
    lines = output.splitlines()
    ours = next(number for number, line in enumerate(lines) if line.strip().startswith("--random-weights"))
    assert ours < 40
    assert any(line.strip().startswith("--tensor-model-parallel-size") for line in lines[ours:])
