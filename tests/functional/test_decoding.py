"""Images are decoded by the pipeline stage that has the vision tower, and by no other; the training is the same."""

import json
import shutil
from pathlib import Path

import pytest

from tests import digits_checkpoint
from tests.cases import later
from tests.functional.launch import SCRIPT, run_script
from tests.functional.test_training import assert_same_curve, train

PP2 = ("--pipeline-model-parallel-size", 2)
# The example, with the ranks that decode an image noted in a file.
COUNTED = f"""
import os, runpy
from megatron_vlbridge.data.processors import published
load = published.load_image
def load_and_note(*arguments, **options):
    with open(f"decoded-{{os.environ['RANK']}}", "a") as file:
        file.write("x")
    return load(*arguments, **options)
published.load_image = load_and_note
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = digits_checkpoint.write(tmp_path_factory.mktemp("decoding"))
    (folder / "counted.py").write_text(COUNTED)
    return folder


def decoded(folder: Path, *arguments: object, processes: int = 1) -> tuple[list[float], list[int]]:
    """The losses, and how many images each rank decodes."""
    files = [folder / f"decoded-{rank}" for rank in range(processes)]
    for file in files:
        file.unlink(missing_ok=True)
    losses = train(
        folder, "--hf-folder", "hf", "--hf-weights", *arguments, processes=processes, script=folder / "counted.py"
    )
    return losses, [len(file.read_text()) if file.exists() else 0 for file in files]


@pytest.mark.parametrize(
    ("layout", "processes", "decoders"),
    [
        (PP2, 2, [0]),
        later((*PP2, "--tensor-model-parallel-size", 2), 4, [0]),
        later((*PP2, "--context-parallel-size", 2), 4, [0, 1]),
        later((*PP2, "--num-layers-per-virtual-pipeline-stage", 1), 2, [0]),
    ],
    ids=["pp2", "tp2-pp2", "cp2-pp2", "pp2-vpp2"],
)
def test_only_the_stage_of_the_tower_decodes(folder: Path, layout: tuple, processes: int, decoders: list[int]) -> None:
    expected, (count,) = decoded(folder)
    losses, found = decoded(folder, *layout, processes=processes)
    assert_same_curve(losses, expected)
    assert count > 0
    assert found == [count if rank in decoders else 0 for rank in range(processes)]


def test_a_broken_image_ends_the_run_on_all_stages(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    image = next(part["image"] for part in json.loads(lines[0])["messages"][0]["content"] if part["type"] == "image")
    file = tmp_path / image
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run = ("--cpu", "--data", "train.jsonl", "--hf-folder", "hf", "--hf-weights", "--seq-length", 256, "--seed", 5)
    run += ("--micro-batch-size", 1, "--global-batch-size", 4, "--train-iters", 12, "--lr", 1e-3, "--log-interval", 1)
    run += ("--lr-decay-style", "constant", "--num-workers", 0, *PP2)
    codes, _, errors = run_script(SCRIPT, tmp_path, *run, processes=2)
    assert all(codes)
    assert errors.count("train.jsonl, line 1: ") == 1
