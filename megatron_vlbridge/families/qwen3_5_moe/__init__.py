"""Qwen3.5 with experts and a shared expert (35B-A3B, 122B-A10B, 397B-A17B)."""

from dataclasses import replace

from megatron_vlbridge.families import qwen3_vl_moe
from megatron_vlbridge.families.experts import ExpertLayout
from megatron_vlbridge.families.qwen3_5_moe.config import CONFIG, language_fields

FAMILY = replace(
    qwen3_vl_moe.FAMILY,
    config=CONFIG,
    language_fields=language_fields,
    expert_layout=ExpertLayout.FUSED_OUT_IN,
)
