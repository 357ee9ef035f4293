"""What the command line may not say."""

import sys
from pathlib import Path

import pytest

from megatron_vlbridge.errors import VLBridgeError
from tests import reference
from tests.functional.pool import Layout, Pool


def refusal(layout: Layout, arguments: list[str]) -> str:
    """What `parse_arguments` says to these arguments."""
    from megatron_vlbridge.training.pretrain import parse_arguments

    saved, sys.argv = sys.argv, ["pretrain", "--conversations", "none.jsonl", *arguments]
    try:
        parse_arguments()
    except VLBridgeError as error:
        return str(error)
    finally:
        sys.argv = saved
    return "accepted"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-layers", "5"], "--num-layers is 5, but"),
        (["--num-experts", "8"], "--num-experts is 8, but"),
        (["--num-query-groups", "3"], "--num-query-groups is 3, but"),
        (["--norm-epsilon", "0.1"], "--norm-epsilon is 0.1, but"),
        (["--position-embedding-type", "rope"], "--position-embedding-type is rope, but"),
        (["--rotary-base", "77"], "--rotary-base is 77, but"),
        (["--hidden-size", "128"], "--hidden-size is 128, but"),
        (["--micro-batch-size", "2"], "a micro-batch is one pack"),
        (["--mtp-num-layers", "1"], "--mtp-num-layers is 1, but"),
        (["--use-megatron-fsdp"], "--use-megatron-fsdp is not proved"),
        (["--use-torch-fsdp2"], "--use-torch-fsdp2 is not proved"),
        (["--grad-reduce-in-bf16"], "--grad-reduce-in-bf16 is not proved"),
        (["--main-grads-dtype", "bf16"], "--main-grads-dtype bf16 is not proved"),
        (["--optimizer", "muon"], "--optimizer muon is not proved"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_contradiction_is_refused(pool: Pool, tmp_path: Path, arguments: list[str], said: str) -> None:
    folder = reference.write_checkpoint(tmp_path)
    assert said in pool.run(refusal, Layout(), arguments=["--hf-folder", str(folder), *arguments])[0]


def test_an_optimizer_state_that_torchs_adam_cannot_take_is_refused(pool: Pool, tmp_path: Path) -> None:
    """Megatron would end in an assertion without a message."""
    folder = reference.write_checkpoint(tmp_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "latest_checkpointed_iteration.txt").write_text("3")
    arguments = ["--hf-folder", str(folder), "--load", str(saved), "--use-distributed-optimizer"]
    assert "start a new state with --no-load-optim" in pool.run(refusal, Layout(), arguments=arguments)[0]
