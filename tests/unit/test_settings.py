"""A config made for a checkpoint, without a word about training, is supported as it is."""

from pathlib import Path

import pytest

from megatron_vlbridge.config import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.training.guards import check_layout
from megatron_vlbridge.training.settings import setting_faults

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
SUPPORTED = sorted(CONFIGS.glob("Qwen3-VL-*.json"))


@pytest.mark.parametrize("file", SUPPORTED, ids=lambda file: file.stem)
def test_the_config_of_a_published_checkpoint_needs_no_loss_setting(file: Path) -> None:
    checkpoint = read_config(file)
    config = language_config(checkpoint)
    assert setting_faults(config, checkpoint) == []
    check_layout(config, checkpoint)


def test_another_average_that_was_asked_for_is_refused() -> None:
    checkpoint = read_config(SUPPORTED[0])
    with pytest.raises(VLBridgeError, match="calculate_per_token_loss"):
        check_layout(language_config(checkpoint, calculate_per_token_loss=False), checkpoint)


def test_the_settings_of_a_base_are_kept() -> None:
    checkpoint = read_config(SUPPORTED[0])
    base = language_config(checkpoint, calculate_per_token_loss=False)
    assert not language_config(checkpoint, base).calculate_per_token_loss
