"""Dense Qwen3.5 (0.8B to 27B), and the releases with its classes (3.6, 3.8)."""

from megatron_vlbridge.families import qwen3_vl
from megatron_vlbridge.families.family import Family
from megatron_vlbridge.families.qwen3_5.config import CONFIG
from megatron_vlbridge.families.qwen3_5.fields import language_fields
from megatron_vlbridge.families.qwen3_5.rules import rules

FAMILY = Family(
    config=CONFIG,
    rules=rules,
    embedding=qwen3_vl.FAMILY.embedding,
    head=qwen3_vl.FAMILY.head,
    layers=qwen3_vl.FAMILY.layers,
    language_fields=language_fields,
    vision_fields=qwen3_vl.FAMILY.vision_fields,
    combinations=qwen3_vl.FAMILY.combinations,
)
