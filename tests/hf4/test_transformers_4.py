"""Transformers 4.57, the first that knew these models: what it saves is imported, and what is exported it loads."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.config import read_config
from megatron_vlbridge.families import ExpertForm
from tests.hf4.logits import load, logits

ROOT = Path(__file__).parents[2]
TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_theta": 5e6,
    "rope_scaling": {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
TOKENS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 8, "vision_end_token_id": 9}


def write(folder: Path, kind: str, tied: bool) -> Path:
    """A small checkpoint of random bfloat16 weights, as this transformers saves it."""
    of = {"dense": "Qwen3VL", "experts": "Qwen3VLMoe"}[kind]
    # The published files say it in both places; this transformers looks into the text's.
    text = TEXT | (EXPERTS if kind == "experts" else {}) | {"tie_word_embeddings": tied}
    config = getattr(transformers, f"{of}Config")(
        text_config=text, vision_config=VISION, tie_word_embeddings=tied, **TOKENS
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{of}ForConditionalGeneration")(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_it_is_the_old_one() -> None:
    assert transformers.__version__.startswith("4.57.")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_what_it_saved_comes_back_and_loads(tmp_path: Path, kind: str, tied: bool) -> None:
    source = write(tmp_path / "hf", kind, tied)
    back = export_checkpoint(import_checkpoint(source, tmp_path / "megatron"), tmp_path / "back")
    expected, found = tensors(source), tensors(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.int16), x.view(torch.int16)) for name, x in expected.items())
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
    torch.testing.assert_close(logits(back), torch.load(tmp_path / "logits"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [form for form in ExpertForm if form is not ExpertForm.FUSED_IN_OUT])
def test_experts_of_any_form_are_exported_as_it_wants_them(tmp_path: Path, form: ExpertForm) -> None:
    source = write(tmp_path / "hf", "experts", tied=False)
    imported = import_checkpoint(source, tmp_path / "megatron")
    other = export_checkpoint(imported, tmp_path / "other", experts=str(form))
    again = import_checkpoint(other, tmp_path / "again")
    back = export_checkpoint(again, tmp_path / "back", experts=str(ExpertForm.FUSED_IN_OUT))
    torch.testing.assert_close(logits(back), logits(source), rtol=0, atol=0)
