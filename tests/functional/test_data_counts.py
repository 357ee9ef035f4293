"""What a run has read of each source, in its checkpoints and at the end: the same in each layout and after a resume."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import digits_checkpoint
from tests.cases import later
from tests.functional.launch import SCRIPT, run_script
from tests.functional.test_training import assert_same_curve, losses_of

META = """
train:
  - {path: train.jsonl, weight: 1.5}
  - {path: more.jsonl, weight: 0.5}
"""
ITERATIONS, BATCH = 8, 4
BROKEN = (2, 9, 17, 21)
PP2 = ("--pipeline-model-parallel-size", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A meta file; in the first source four images are cut, one conversation is to be truncated, two are left out."""
    folder = digits_checkpoint.write(tmp_path_factory.mktemp("counts"))
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "more.jsonl").write_text("".join(lines[:10]))
    kept = lines[10:]
    for number in BROKEN:
        messages = json.loads(kept[number])["messages"]
        file = folder / next(part["image"] for part in messages[0]["content"] if part["type"] == "image")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    question = {"role": "user", "content": "three " * 300}
    answer = {"role": "assistant", "content": "three"}
    skipped = {"role": "assistant", "content": "four", "train": False}
    start = [{"role": "user", "content": "three"}, skipped, {"role": "user", "content": "five"}, answer]
    more = [[question, answer], [*start, question, answer], [{"role": "user", "content": "nothing"}]]
    (folder / "train.jsonl").write_text("".join(kept) + "".join(json.dumps({"messages": one}) + "\n" for one in more))
    (folder / "meta.yaml").write_text(META)
    return folder


def train(folder: Path, save: str, *arguments: object, processes: int = 1) -> str:
    """What the ranks print and log."""
    common = ("--data", "meta.yaml", "--hf-folder", "hf", "--hf-weights", "--seq-length", 128, "--seed", 5)
    common += ("--micro-batch-size", 1, "--global-batch-size", BATCH, "--lr", 1e-3, "--lr-decay-style", "constant")
    common += ("--train-iters", ITERATIONS, "--log-interval", 1)
    common += ("--max-bad-samples", 0.2, "--long-conversations", "truncate", "--save", save, "--save-interval", 100)
    common += ("--pack-multiple-of", 4, "--num-workers", 0)
    codes, output, errors = run_script(SCRIPT, folder, "--cpu", *common, *arguments, processes=processes)
    assert not any(codes), errors
    return output + errors


def saved(folder: Path, run: str, iteration: int) -> list[dict[str, Any]]:
    file = folder / run / f"iter_{iteration:07d}" / "vlbridge_data.json"
    sources: list[dict[str, Any]] = json.loads(file.read_text())["sources"]
    return sources


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """The counts and the losses of an uninterrupted run of one process."""
    output = train(folder, "whole")
    counts = saved(folder, "whole", ITERATIONS)
    assert f"\ndata     {counts[1]['source']}: {counts[1]['read']} read; of 10 conversations none left out\n" in output
    (line,) = (line for line in output.splitlines() if line.startswith("data     train.jsonl: "))
    assert f" {counts[0]['read']} read, {counts[0]['replaced']} replaced; of 41 conversations 1 dropped, 1 tr" in line
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (documented,) = (line.strip() for line in page.splitlines() if line.startswith("    data     train.jsonl: "))
    assert re.sub(r"\d+", "N", line) == re.sub(r"\d+", "N", documented)
    assert output.count("replaced: ") == len(BROKEN)
    return counts, losses_of(output)


@pytest.fixture(scope="module")
def whole(whole_run: tuple[list[dict[str, Any]], list[float]]) -> list[dict[str, Any]]:
    return whole_run[0]


def test_the_counts_are_those_of_the_sources(whole: list[dict[str, Any]]) -> None:
    first, second = whole
    assert [one["source"] for one in whole] == ["train.jsonl", "more.jsonl"]
    expected = {"conversations": 41, "dropped": 1, "truncated": 1, "failed": 1, "assistant_turns": 40}
    assert {key: first[key] for key in expected} == expected
    assert (first["unlearned_turns"], second["unlearned_turns"]) == (1, 0)
    assert second["conversations"] == second["assistant_turns"] == 10
    assert [second[key] for key in ("dropped", "truncated", "failed", "replaced")] == [0] * 4
    assert first["read"] > 8 * second["read"] > 0
    # Each of 39 conversations of the first source is read as often as the others, or once more or less.
    times = first["read"] / 39
    assert len(BROKEN) * (times - 1) <= first["replaced"] <= len(BROKEN) * (times + 1)
    assert first["replaced"] >= len(BROKEN)


@pytest.mark.parametrize(
    ("name", "layout", "processes"),
    [
        ("pp2", PP2, 2),
        later("dp2", (), 2),
        later("tp2", ("--tensor-model-parallel-size", 2), 2),
        later("cp2-pp2", (*PP2, "--context-parallel-size", 2), 4),
        later("vpp2", (*PP2, "--num-layers-per-virtual-pipeline-stage", 1), 2),
    ],
)
def test_a_run_of_a_layout_resumed_in_another_has_the_same_counts(
    folder: Path, whole_run: tuple[list[dict[str, Any]], list[float]], name: str, layout: tuple, processes: int
) -> None:
    """And the same losses: on all stages the same conversations take the places of the broken ones."""
    whole, losses = whole_run
    half = ITERATIONS // 2
    output = train(folder, name, "--exit-interval", half, *layout, processes=processes)
    before = saved(folder, name, half)
    # A data-parallel rank logs those of its own packs.
    assert 0 < output.count("replaced: ") <= len(BROKEN) * (2 if name == "dp2" else 1)
    rest = train(folder, name, "--load", name)
    assert_same_curve(losses_of(output) + losses_of(rest), losses)
    assert saved(folder, name, ITERATIONS) == whole
    for early, late in zip(before, whole, strict=True):
        assert 0 < early["read"] < late["read"]
    assert 0 < before[0]["replaced"] < whole[0]["replaced"]
