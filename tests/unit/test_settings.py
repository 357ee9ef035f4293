"""A config made for a checkpoint, without a word about training, is supported as it is."""

from pathlib import Path

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.training.guards import check_layout
from megatron_vlbridge.training.settings import setting_faults

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
SUPPORTED = sorted(CONFIGS.glob("Qwen3-VL-*.json"))


@pytest.mark.parametrize("file", SUPPORTED, ids=lambda file: file.stem)
def test_the_config_of_a_published_checkpoint_needs_no_loss_setting(file: Path) -> None:
    hf_config = read_config(file)
    config = language_config(hf_config)
    assert setting_faults(config, hf_config) == {}
    check_layout(config, hf_config)


def test_another_average_that_was_asked_for_is_refused() -> None:
    hf_config = read_config(SUPPORTED[0])
    with pytest.raises(VLBridgeError, match="calculate_per_token_loss"):
        check_layout(language_config(hf_config, calculate_per_token_loss=False), hf_config)


def test_the_average_of_a_framework_is_its_own() -> None:
    hf_config = read_config(SUPPORTED[0])
    config = language_config(hf_config, calculate_per_token_loss=False)
    assert not check_layout(config, hf_config, own_loss=True)
    config = language_config(hf_config, calculate_per_token_loss=False, moe_router_dtype="fp64")
    with pytest.raises(VLBridgeError, match="moe_router_dtype") as error:
        check_layout(config, hf_config, own_loss=True)
    assert "calculate_per_token_loss" not in str(error.value)
    with_mtp = language_config(hf_config, calculate_per_token_loss=False, mtp_num_layers=1)
    with pytest.raises(VLBridgeError, match="calculate_per_token_loss"):
        check_layout(with_mtp, hf_config, own_loss=True)


def test_the_settings_of_a_base_are_kept() -> None:
    hf_config = read_config(SUPPORTED[0])
    base = language_config(hf_config, calculate_per_token_loss=False)
    assert not language_config(hf_config, base).calculate_per_token_loss


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_stages_exchange_lengths_where_deepstack_features_cross_them(first: int) -> None:
    """Three layers take features; the stages' hidden states have one length if all three are on the first."""
    hf_config = read_config(CONFIGS / "Qwen3-VL-2B-Instruct.json")
    assert len(hf_config.vision.deepstack_visual_indexes) == 3
    stages = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
    split = language_config(hf_config, num_layers_in_first_pipeline_stage=first, **stages)
    assert split.variable_seq_lengths == (first < 3)
    layout = f"E{'t' * first}|{'t' * (hf_config.text.num_layers - first)}L"
    assert language_config(hf_config, pipeline_model_parallel_layout=layout, **stages).variable_seq_lengths == (
        first < 3
    )
