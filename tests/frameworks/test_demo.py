"""The demo reads adapters by peft where it is installed; otherwise it merges them, to the same logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.peft.config import AdapterConfig
from megatron_vlbridge.checkpoint.peft.writer import write_adapter
from megatron_vlbridge.demo.answers import ask_transformers, merge_adapter
from megatron_vlbridge.demo.digits import conversations, load_scans
from megatron_vlbridge.demo.start import write_checkpoint
from megatron_vlbridge.model.lora.targets import lora_table, select_weights


@pytest.mark.filterwarnings("error::UserWarning")  # peft only warns of keys that it does not load
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5_moe"])
def test_merged_adapters_give_the_logits_of_peft(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path / "base", seed=0, family=family)
    config = read_config(tmp_path / "base")
    shapes = lora_table(config).hf_shapes
    pairs = {
        name: (
            0.1 * torch.randn(*shapes[name][:-2], 2, shapes[name][-1]),
            0.1 * torch.randn(*shapes[name][:-1], 2),
        )
        for name in select_weights(config, vision=True)
    }
    write_adapter(tmp_path / "adapter", "base", AdapterConfig(2, 6.0), pairs)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merge_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "merged")

    asked = conversations(load_scans()[:4], pairs=2)
    found = ask_transformers(tmp_path / "merged", asked).logits
    expected = ask_transformers(tmp_path / "base", asked, tmp_path / "adapter").logits
    alone = ask_transformers(tmp_path / "base", asked).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (alone - expected).norm() > 1e-2 * expected.norm()
