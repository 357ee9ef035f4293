"""The config of a checkpoint from transformers' object is the one from its file."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_vlbridge import read_config
from megatron_vlbridge.integrations.hf_config import read_hf_config

CONFIGS = sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_config_of_transformers_is_that_of_the_file(tmp_path: Path, file: Path) -> None:
    shutil.copy(file, tmp_path / "config.json")
    hf_config = AutoConfig.from_pretrained(tmp_path)
    assert read_hf_config(hf_config) == read_config(file)
    # verl adds it, and unties a critic.
    hf_config.rope_theta, hf_config.tie_word_embeddings = 1.0, False
    assert read_hf_config(hf_config) == dataclasses.replace(read_config(file), tie_word_embeddings=False)
