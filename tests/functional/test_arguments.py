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
        (["--hidden-size", "128"], "--hidden-size is 128, but"),
        (["--micro-batch-size", "2"], "a micro-batch is one pack"),
        (["--mtp-num-layers", "1"], "--mtp-num-layers is 1, but"),
        (["--use-megatron-fsdp"], "--use-megatron-fsdp is not proved"),
        (["--use-torch-fsdp2"], "--use-torch-fsdp2 is not proved"),
    ],
    ids=["layers", "hidden", "micro-batch", "prediction-layers", "megatron-fsdp", "torch-fsdp"],
)
def test_contradiction_is_refused(pool: Pool, tmp_path: Path, arguments: list[str], said: str) -> None:
    folder = reference.write_checkpoint(tmp_path)
    assert said in pool.run(refusal, Layout(), arguments=["--hf-folder", str(folder), *arguments])[0]
