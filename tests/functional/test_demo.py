import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from megatron_vlbridge.demo.answers import Answers, ask_transformers
from megatron_vlbridge.demo.digits import WORDS, answer, load_conversations
from megatron_vlbridge.demo.output import LORA_STAGES, STAGES, Folder, Progress
from megatron_vlbridge.demo.pipeline import Options, run

SMALL = Options(
    iterations=3,
    train_scans=30,
    train_pairs=10,
    train_videos=9,
    held_out_scans=12,
    held_out_pairs=4,
    held_out_videos=5,
)


def also(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.layouts)


@pytest.mark.parametrize(
    ("family", "size"),
    [("qwen3_vl", 1), also("qwen3_5_moe", 1), also("qwen3_vl", 2), also("qwen3_5", 2), also("qwen3_vl_moe", 1)],
)
def test_the_whole_pipeline_gives_equal_models_and_all_files(tmp_path: Path, family: str, size: int) -> None:
    folder = Folder(tmp_path / "out")
    progress = Progress(sys.stdout)
    result = run(replace(SMALL, out=folder.root, tp=size, pp=size, family=family), progress)

    accurate, same_accuracy, same_logits, blind = result.claims
    assert same_accuracy.holds
    assert same_logits.holds
    assert result.other_answers == 0
    assert len(result.losses) == SMALL.iterations
    assert result.losses[-1] < result.losses[0]
    assert (result.train_conversations, result.held_out_conversations) == (49, 21)
    assert len(progress.seconds) == STAGES
    for name in ("data", "hf_start", "megatron_start", "megatron_trained", "hf_trained", "logs"):
        assert any(getattr(folder, name).iterdir())
    for image in (folder.loss, folder.answers):
        assert image.read_bytes().startswith(b"\x89PNG")
    # A table of lengths that does not match the data or the processor is an error of the training.
    assert (folder.data / "meta.yaml.train.lengths").is_file()
    log = (folder.logs / "training.log").read_text(encoding="utf-8")
    for source, count in (("images.jsonl", 40), ("videos.jsonl", 9)):
        assert re.search(rf"{source}: \d+ read; of {count} conversations", log), log
    text = folder.report.read_text(encoding="utf-8")
    assert accurate.found in text
    assert blind.found in text

    before, after = (load_file(f / "model.safetensors") for f in (folder.hf_start, folder.hf_trained))
    assert before.keys() == after.keys()
    unchanged = [name for name in before if before[name].equal(after[name])]
    assert not unchanged
    AutoModelForImageTextToText.from_pretrained(folder.hf_trained)


@pytest.mark.parametrize(("family", "size"), [("qwen3_vl", 1), also("qwen3_5_moe", 1), also("qwen3_vl_moe", 2)])
def test_adapters_of_a_base_that_knows_half_of_the_digits(tmp_path: Path, family: str, size: int) -> None:
    folder = Folder(tmp_path / "out")
    progress = Progress(sys.stdout)
    options = replace(SMALL, out=folder.root, tp=size, pp=size, family=family, lora=True)
    result = run(options, progress)

    _, same_accuracy, same_logits, _, base = result.claims
    assert same_accuracy.holds
    assert same_logits.holds
    assert result.other_answers == 0
    assert len(result.losses) == SMALL.iterations
    assert len(progress.seconds) == LORA_STAGES
    assert base.found in folder.report.read_text(encoding="utf-8")

    sources = {name: load_conversations(folder.data / f"{name}.jsonl") for name in ("base-images", "base-videos")}
    assert result.base is not None
    assert result.base.conversations == sum(map(len, sources.values()))
    for conversations in sources.values():
        assert {word for one in conversations for word in answer(one).split()} <= set(WORDS[:5])
        assert conversations
    held_out = load_conversations(folder.data / "held-out.jsonl")
    # The equal logits are those with adapters.
    alone = ask_transformers(folder.hf_trained, held_out).logits
    found = Answers.load(folder.logs / "megatron-answers.safetensors").logits
    assert (found - alone).norm() > 1e-3 * alone.norm()
    pairs = load_file(folder.adapter / "adapter_model.safetensors")
    assert result.base.adapter_parameters == sum(tensor.numel() for tensor in pairs.values())
    assert all(tensor.any() for tensor in pairs.values())
