"""The checkpoint that a bridge was made from."""

from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.side_files import copy_side_files
from megatron_vlbridge.integrations.auto_bridge.unsupported import not_offered


class Pretrained:
    """A Hugging Face folder or Hub id, with the names that frameworks read of Megatron-Bridge's `hf_pretrained`."""

    def __init__(self, name: str | Path) -> None:
        self.model_name_or_path = self.name_or_path = str(name)

    def __getattr__(self, name: str) -> Any:
        raise not_offered("hf_pretrained", name)

    @cached_property
    def config(self) -> Any:
        """The checkpoint's config as an object of transformers, for weights that are not quantized."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(find_folder(self.model_name_or_path, weights=False))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def save_artifacts(self, save_directory: str | Path) -> None:
        """Copy config, tokenizer, processor and all other files but the weights."""
        copy_side_files(find_folder(self.model_name_or_path, weights=False), Path(save_directory))
