"""Transformers 4.57, the first that knew these models: what it saves is imported, and what is exported it loads."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.config import read_config
from megatron_vlbridge.families import ExpertForm
from tests.closeness import assert_close_in_norm
from tests.hf4.logits import load, logits
from tests.unit.test_convert import ROPE, TEXT, TOKENS, VISION, assert_same_bits, tensors

ROOT = Path(__file__).parents[2]
# This transformers keeps the base beside the other parameters of the rotary embedding.
ROPE_4: dict[str, Any] = {
    "rope_theta": ROPE["rope_theta"],
    "rope_scaling": {key: value for key, value in ROPE.items() if key != "rope_theta"},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def write(folder: Path, kind: str, tied: bool) -> Path:
    """A small checkpoint of random bfloat16 weights, as this transformers saves it."""
    of = {"dense": "Qwen3VL", "experts": "Qwen3VLMoe"}[kind]
    # The published files say it in both places; this transformers looks into the text's.
    text = {key: value for key, value in TEXT.items() if key != "rope_parameters"} | ROPE_4
    text |= (EXPERTS if kind == "experts" else {}) | {"tie_word_embeddings": tied}
    config = getattr(transformers, f"{of}Config")(
        text_config=text, vision_config=VISION, tie_word_embeddings=tied, **TOKENS
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{of}ForConditionalGeneration")(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def test_it_is_the_old_one() -> None:
    assert transformers.__version__.startswith("4.57.")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_what_it_saved_comes_back_and_loads(tmp_path: Path, kind: str, tied: bool) -> None:
    source = write(tmp_path / "hf", kind, tied)
    back = export_checkpoint(import_checkpoint(source, tmp_path / "megatron"), tmp_path / "back")
    expected, found = tensors(source), tensors(back)
    assert_same_bits(found, expected)
    for name, parameter in load(back).state_dict().items():
        if name in expected:
            assert torch.equal(parameter, expected[name].float()), name
    assert (read_config(back).tie_word_embeddings, "lm_head.weight" in found) == (tied, not tied)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_the_new_one_computes_the_same_from_an_export(tmp_path: Path, kind: str) -> None:
    """By which the Megatron model is measured in all other tests."""
    imported = import_checkpoint(write(tmp_path / "hf", kind, tied=False), tmp_path / "megatron")
    back = export_checkpoint(imported, tmp_path / "back")
    command = [ROOT / ".venv/bin/python", "-m", "tests.hf4.logits", back, tmp_path / "logits"]
    subprocess.run(command, check=True, cwd=ROOT)
    assert_close_in_norm(logits(back), torch.load(tmp_path / "logits"))


@pytest.mark.parametrize("form", [form for form in ExpertForm if form is not ExpertForm.FUSED_IN_OUT])
def test_experts_of_any_form_are_exported_as_it_wants_them(tmp_path: Path, form: ExpertForm) -> None:
    source = write(tmp_path / "hf", "experts", tied=False)
    imported = import_checkpoint(source, tmp_path / "megatron")
    other = export_checkpoint(imported, tmp_path / "other", experts=str(form))
    again = import_checkpoint(other, tmp_path / "again")
    back = export_checkpoint(again, tmp_path / "back", experts=str(ExpertForm.FUSED_IN_OUT))
    assert torch.equal(logits(back), logits(source))
