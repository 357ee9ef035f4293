"""Models of transformers in torch pipelines equal no pipeline, and what would lose media is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.conversations import read_conversations
from tests import digits_checkpoint, pipeline_models
from tests.closeness import FP32
from tests.functional import launch, torch_guard_ranks, torch_pipeline_ranks
from tests.functional.doc_blocks import ROOT, all_blocks
from tests.functional.pool import Layout, Pool
from tests.functional.torch_pipeline_ranks import COUNTS, Run

TWO = Layout(pp=2, world=2)
SCHEDULES = [("gpipe", 2), ("gpipe", 4), ("1f1b", 2), ("1f1b", 4), ("interleaved", 2), ("interleaved", 4)]
FORMS = ["step", "no pixels", "lists", "eval"]
FEW: list[Run] = [
    ("1f1b", 2, "step", "mixed", 0),
    ("interleaved", 4, "no pixels", "text around", 2),
    ("interleaved", 4, "eval", "mixed", 0),
]
MORE: list[Run] = [
    *FEW,
    ("interleaved", 4, "step", "mixed", 0),
    ("1f1b", 4, "step", "text first", 0),
    ("1f1b", 4, "eval", "text last", 0),
    ("1f1b", 4, "step", "text", 0),
    ("1f1b", 4, "lists", "images", 3),
    ("gpipe", 2, "lists", "text last", 0),
    ("gpipe", 2, "no pixels", "videos", 0),
    ("gpipe", 2, "step", "mixed", 2),
]
ALL: list[Run] = [
    (schedule, n, FORMS[(start + index) % len(FORMS)], counts, 2 * ((start + index) % 3 == 0))
    for start, (schedule, n) in enumerate(SCHEDULES)
    for index, counts in enumerate([*list(COUNTS)[start:], *list(COUNTS)[:start]])
]


# What `make test` runs: a tower with deepstack, linear attention with experts, a model whose placeholders are expanded.
CHOSEN = ("qwen3_vl", "qwen3_5_moe", "kimi_k25")


def assert_equal(pool: Pool, kind: str, runs: list[Run]) -> None:
    results = pool.run(torch_pipeline_ranks.compare, TWO, kind=kind, runs=runs)
    errors = {name: error for of_rank in results for name, error in of_rank.items()}
    assert max(errors.values()) < FP32, sorted(errors.items(), key=lambda item: -item[1])[:5]
    parameters = {name for name, _ in pipeline_models.build(kind).named_parameters()}
    for schedule, n, form, counts, padding in runs:
        label = f"{schedule} {n} {form} {counts} {padding} "
        found = {name.removeprefix(label) for name in errors if name.startswith(label)}
        assert "loss" in found
        assert ("logits" in found) != (form == "lists")
        if counts == "mixed":
            assert found - {"loss", "logits"} == (set() if form == "eval" else parameters)


@pytest.mark.parametrize("kind", CHOSEN)
def test_a_pipeline_equals_no_pipeline(pool: Pool, kind: str) -> None:
    assert_equal(pool, kind, MORE if kind == "qwen3_vl" else FEW)


@pytest.mark.layouts
@pytest.mark.parametrize("kind", pipeline_models.KINDS)
def test_every_schedule_form_and_batch_equals_no_pipeline(pool: Pool, kind: str) -> None:
    assert {run[0:2] for run in ALL} == set(SCHEDULES)
    assert {(run[0], run[2]) for run in ALL} == {(name, form) for name, _ in SCHEDULES for form in FORMS}
    assert {(run[0], run[3]) for run in ALL} == {(name, counts) for name, _ in SCHEDULES for counts in COUNTS}
    assert_equal(pool, kind, ALL)


def test_every_fault_is_refused_on_all_ranks_before_the_first_step(pool: Pool) -> None:
    first, second = pool.run(torch_guard_ranks.sabotage, TWO)
    words = {name: fault[-1] for name, fault in (torch_guard_ranks.BATCHES | torch_guard_ranks.MODULES).items()}
    words["a dataset out of step"] = "expected the samples of stage 1.*found other input_ids.*same seed"
    words["counts of other samples, with a config"] = "sample 2: expected.*image tokens, those of its 2 images"
    assert first.keys() == words.keys()
    for name, expected in words.items():
        assert first[name] == second[name], name
        position = 0
        for phrase in expected.split(".*"):
            position = first[name].find(phrase, position)
            assert position >= 0, f"{name}: {phrase!r} not in {first[name]!r}"


def test_pipelines_without_a_fault_are_accepted_and_left_as_they_are(pool: Pool) -> None:
    for errors in pool.run(torch_guard_ranks.accept, TWO, kinds=tuple(pipeline_models.KINDS)):
        assert errors
        assert not any(errors), errors


def test_levels_of_deepstack_without_a_layer_on_the_first_stage_are_refused(pool: Pool) -> None:
    """transformers drops them silently."""
    for error in pool.run(torch_guard_ranks.too_few_layers, TWO):
        assert "stage 0 (Part): expected a path to the loss" in error
        assert "visual.deepstack_merger_list.1" in error


def test_the_code_on_the_page_trains(pool: Pool) -> None:
    (code,) = [one.text for one in all_blocks() if one.page == "docs/torch-pipeline.md"]
    for errors in pool.run(torch_pipeline_ranks.run_page, TWO, code=code):
        assert errors
        assert max(errors.values()) < FP32


def train_with_transformers(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and weights of the example's recipe, with transformers' model as it is."""
    import transformers

    example, hf = torch_pipeline_ranks.example(), folder / "hf"
    processor = transformers.AutoProcessor.from_pretrained(hf)
    model = transformers.AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32)
    samples = [encode_conversation(x, processor) for x in read_conversations(folder / "train.jsonl")]
    length = max(len(sample.input_ids) for sample in samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(example.STEPS):
        first = step * example.SAMPLES
        chosen = [samples[(first + index) % len(samples)] for index in range(example.SAMPLES)]
        batch = example.collate(chosen, length, 0, model)
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "pixel_values", "image_grid_thw")}
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.data for name, parameter in model.named_parameters()}


def test_the_example_learns_as_transformers_does(tmp_path: Path) -> None:
    """With embedding and head tied, which are on different stages."""
    folder = digits_checkpoint.write(tmp_path, conversations=16)
    out, script = folder / "out", ROOT / "examples" / "torch_pipeline.py"
    arguments = folder / "hf", folder / "train.jsonl", out
    printed = launch.run_example(folder, *arguments, processes=2, script=script, options=())
    losses = [float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)$", printed, re.MULTILINE)]
    expected, expected_weights = train_with_transformers(folder)
    assert losses == pytest.approx(expected, abs=2e-4)
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    before, weights = (load_file(path / "model.safetensors") for path in (folder / "hf", out))
    assert weights.keys() == expected_weights.keys() == before.keys()
    for name, weight in weights.items():
        step = (expected_weights[name] - before[name]).norm()
        assert step > 0, name
        assert (weight - expected_weights[name]).norm() < 0.01 * step, name


def test_the_page_names_each_class_of_the_tests() -> None:
    page = (ROOT / "docs" / "torch-pipeline.md").read_text()
    names: dict[str, Any] = {
        kind: f"{name}ForConditionalGeneration" for kind, (name, _) in pipeline_models.KINDS.items()
    }
    for name in names.values():
        assert re.search(rf"^\| `{name}` \| verified", page, re.MULTILINE), name
    assert re.search(r"^\| `Gemma4ForConditionalGeneration`.* \| rejected", page, re.MULTILINE)
