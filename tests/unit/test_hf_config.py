"""A config of transformers means what its config.json means."""

import shutil
from pathlib import Path

import pytest
import transformers

from megatron_vlbridge import read_config
from megatron_vlbridge.integrations.hf_config import read_hf_config
from tests.errors import rejects

CONFIGS = sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_published_config_is_read_as_its_file(tmp_path: Path, file: Path) -> None:
    shutil.copyfile(file, tmp_path / "config.json")
    assert read_hf_config(transformers.AutoConfig.from_pretrained(tmp_path)) == read_config(file)


def test_a_changed_config_is_read_as_changed_and_errors_name_it() -> None:
    config = transformers.AutoConfig.from_pretrained(CONFIGS[0])
    config.text_config.num_hidden_layers = 3
    assert read_hf_config(config).text.num_layers == 3
    config.text_config.hidden_act = "relu"
    with rejects("hidden_act", "relu", start="hf_config: "):
        read_hf_config(config)
