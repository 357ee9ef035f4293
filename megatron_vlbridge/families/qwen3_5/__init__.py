"""Dense Qwen3.5: its `config.json` can be read, its weights are not supported."""

from megatron_vlbridge.families.qwen3_5.config import CONFIG

__all__ = ["CONFIG"]
