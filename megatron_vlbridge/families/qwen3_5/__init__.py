"""Dense Qwen3.5 (0.8B to 27B), and the releases with its classes (3.6, 3.8)."""

from dataclasses import replace

from megatron_vlbridge.families import qwen3_vl
from megatron_vlbridge.families.qwen3_5.config import CONFIG, language_fields

FAMILY = replace(qwen3_vl.FAMILY, config=CONFIG, language_fields=language_fields)
