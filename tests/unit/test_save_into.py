"""Saving beside files that a framework has written."""

import json
from pathlib import Path

from megatron_vlbridge.integrations.auto_bridge.pretrained import Pretrained
from megatron_vlbridge.integrations.save_into import save_into
from tests import reference
from tests.errors import rejects

QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_weights_are_not_saved_beside_a_config_that_names_a_quantization(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": QUANTIZATION}))
    with rejects("config.json: expected no quantization_config", "delete it from the config that the framework writes"):
        save_into([], tmp_path, "base", weights_only=True)
    assert list(tmp_path.iterdir()) == [config]


def test_the_config_of_a_bridge_is_that_of_weights_that_are_not_quantized(tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path / "base")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": QUANTIZATION}))
    Pretrained(folder).config.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
