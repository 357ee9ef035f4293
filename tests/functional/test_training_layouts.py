"""Long runs of the example: all dimensions together, resumed in other layouts."""

from pathlib import Path

import pytest

from tests import digits_checkpoint
from tests.functional.launch import run_script
from tests.functional.test_training import assert_same_curve, scalars, train
from tests.mtp_reference import add_prediction_layer

ITERATIONS, MORE = 20, 2
EVERYTHING = (
    *("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    *("--pipeline-model-parallel-size", 2, "--context-parallel-size", 2),
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("experts", "processes", "other", "same"),
    [
        (False, 4, ("--tensor-model-parallel-size", 4, "--sequence-parallel"), MORE),
        # Megatron cannot load the optimizer state for another EP size; the first loss does not depend on it.
        (True, 8, ("--expert-model-parallel-size", 4, "--pipeline-model-parallel-size", 2, "--no-load-optim"), 1),
    ],
    ids=["dense-then-tp4", "experts-then-ep4-pp2"],
)
def test_all_dimensions_have_the_loss_curve_of_one_process_and_resume_in_other_layouts(
    tmp_path: Path, experts: bool, processes: int, other: tuple, same: int
) -> None:
    """TP2 x SP x PP2 x CP2 for 20 iterations; then its checkpoint in another layout: the first `same` losses agree."""
    folder = digits_checkpoint.write(tmp_path, experts=experts)
    # For Megatron's schedules, the last batches are part of one longer run.
    start = ("--hf-folder", "hf", "--hf-weights", "--train-iters", ITERATIONS + MORE, "--global-batch-size", 4)
    alone = train(folder, *start)
    assert len(alone) == ITERATIONS + MORE
    save = ("--save", "saved", "--save-interval", ITERATIONS, "--exit-interval", ITERATIONS)
    found = train(folder, *start, *save, *EVERYTHING, processes=8)
    assert_same_curve(found, alone[:ITERATIONS])
    more = train(folder, *start, "--load", "saved", *other, processes=processes)
    assert len(more) == MORE
    assert_same_curve(more[:same], alone[ITERATIONS:][:same])


@pytest.mark.long
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_linear_attention_and_mtp_have_the_loss_curve_of_one_process_and_resume(tmp_path: Path, experts: bool) -> None:
    """TP2 x SP x PP2 x CP2 for 20 iterations, both losses; then its checkpoint at TP4."""
    folder = digits_checkpoint.write(tmp_path, experts=experts, linear=True)
    add_prediction_layer(folder / "hf")
    start = ("--hf-folder", "hf", "--hf-weights", "--train-iters", ITERATIONS + MORE, "--global-batch-size", 4)
    alone = train(folder, *start, "--tensorboard-dir", "alone")
    save = ("--save", "saved", "--save-interval", ITERATIONS, "--exit-interval", ITERATIONS)
    found = train(folder, *start, *save, *EVERYTHING, "--tensorboard-dir", "found", processes=8)
    assert_same_curve(found, alone[:ITERATIONS])
    predicted, expected = (scalars(folder / name, "mtp_1 loss") for name in ("found", "alone"))
    assert len(predicted) == ITERATIONS
    assert_same_curve(predicted, expected[:ITERATIONS])
    other = ("--tensor-model-parallel-size", 4, "--sequence-parallel")
    assert_same_curve(train(folder, *start, "--load", "saved", *other, processes=4), alone[ITERATIONS:])


@pytest.mark.layouts
def test_virtual_stages_with_hugging_face_weights_have_the_loss_curve_of_one_process(tmp_path: Path) -> None:
    folder = digits_checkpoint.write(tmp_path)
    start = ("--hf-folder", "hf", "--hf-weights", "--train-iters", 4)
    stages = ("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2)
    assert_same_curve(train(folder, *start, *stages, processes=2), train(folder, *start))


INVALID_PACK = """
import sys
from megatron_vlbridge.backends import cpu_runtime
cpu_runtime.enable()
from transformers import AutoProcessor
from megatron_vlbridge import read_config
from megatron_vlbridge.data.dataset import PackedConversations, read_conversations
from megatron_vlbridge.training.pretrain import parse_arguments, run

image_token_id = None

class OneInvalidPack(PackedConversations):
    def __getitem__(self, index):
        pack = super().__getitem__(index)
        if index == 3:
            pack["tokens"][int((pack["tokens"] == config.image_token_id).nonzero()[0])] = 5
        return pack

args = parse_arguments()
processor, config = AutoProcessor.from_pretrained(args.hf_folder), read_config(args.hf_folder)

def datasets(num_samples, vp_stage=None):
    return OneInvalidPack(
        read_conversations(args.conversations), processor, config,
        seq_length=args.seq_length, num_samples=num_samples[0], seed=args.seed, multiple_of=4,
    ), None, None

run(args, datasets)
"""


def test_an_invalid_pack_ends_the_whole_run_with_the_error(tmp_path: Path) -> None:
    """Stages that wait for the stage with the error do not hang."""
    folder = digits_checkpoint.write(tmp_path)
    (folder / "script.py").write_text(INVALID_PACK)
    command = ["--cpu", "--conversations", "train.jsonl", "--hf-folder", "hf", "--hf-weights", "--seq-length", 256]
    command += ["--global-batch-size", 2, "--lr", 1e-3, "--train-iters", 5, "--num-workers", 0]
    command += ["--pipeline-model-parallel-size", 2, "--context-parallel-size", 2]
    exit_codes, _, errors = run_script(folder / "script.py", folder, *command, processes=4)
    assert any(exit_codes)
    assert "placeholder" in errors, errors[-3000:]
