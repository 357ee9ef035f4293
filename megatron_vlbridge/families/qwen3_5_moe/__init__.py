"""Qwen3.5 with experts: its `config.json` can be read, its weights are not supported."""

from megatron_vlbridge.families.qwen3_5_moe.config import CONFIG

__all__ = ["CONFIG"]
