"""Adapters that peft saves are read as it merges them, and those written here are loaded by it, bit for bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from megatron_vlbridge.checkpoint.peft.adapter import LoraPair, read_adapter
from megatron_vlbridge.checkpoint.peft.config import read_adapter_config
from megatron_vlbridge.checkpoint.peft.writer import write_adapter

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
ATTENTION = r".*language_model.*\.(q_proj|v_proj|o_proj)"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "mlp.experts.down_proj": 2},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 9},
}


def _state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _read(pair: LoraPair) -> tuple[Tensor, Tensor]:
    if pair.experts is None:
        return pair.read()
    a, b = zip(*map(pair.read, range(pair.experts)), strict=True)
    return torch.stack(a), torch.stack(b)


@pytest.mark.filterwarnings("error::UserWarning")  # peft only warns of keys that it does not load
@pytest.mark.parametrize(
    ("modules", "parameters", "options", "count"),
    [
        (ATTENTION, EXPERTS, {}, 10),
        (ATTENTION, EXPERTS, {"use_rslora": True}, 10),
        (ATTENTION, EXPERTS, PATTERNS, 10),
        (ATTENTION, None, {}, 6),
        ([], EXPERTS, {}, 4),
        ([], EXPERTS[:1], {}, 2),
    ],
    ids=["both", "rslora", "patterns", "attention", "experts", "gate-up"],
)
def test_an_adapter_equals_that_of_peft(
    tmp_path: Path, modules: Any, parameters: Any, options: dict[str, Any], count: int
) -> None:
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=TEXT, vision_config=VISION)).float()
    base, fresh = _state(model), copy.deepcopy(model)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=modules, target_parameters=parameters, **options)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "peft")
    merged = _state(adapted.merge_and_unload())
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == count

    found = read_adapter(tmp_path / "peft", {name: tuple(value.shape) for name, value in base.items()})
    assert found.keys() == changed
    pairs = {name: _read(pair) for name, pair in found.items()}
    for name, (a, b) in pairs.items():
        assert torch.equal(base[name] + b @ a * found[name].scaling, merged[name]), name

    write_adapter(tmp_path / "ours", "base", read_adapter_config(tmp_path / "peft"), pairs)
    again = _state(PeftModel.from_pretrained(fresh, tmp_path / "ours").merge_and_unload())
    assert again.keys() == merged.keys()
    for name, value in merged.items():
        assert torch.equal(again[name], value), name
