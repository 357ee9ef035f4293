"""Qwen3.5 with experts and a shared expert (35B-A3B, 122B-A10B, 397B-A17B)."""

from megatron_vlbridge.families import qwen3_5, qwen3_vl_moe
from megatron_vlbridge.families.experts import ExpertLayout
from megatron_vlbridge.families.family import Family
from megatron_vlbridge.families.qwen3_5.rules import rules
from megatron_vlbridge.families.qwen3_5_moe.config import CONFIG
from megatron_vlbridge.families.qwen3_5_moe.fields import language_fields

FAMILY = Family(
    config=CONFIG,
    rules=rules,
    embedding=qwen3_5.FAMILY.embedding,
    head=qwen3_5.FAMILY.head,
    layers=qwen3_5.FAMILY.layers,
    language_fields=language_fields,
    vision_fields=qwen3_5.FAMILY.vision_fields,
    combinations=qwen3_vl_moe.FAMILY.combinations,
    mtp_settings=qwen3_vl_moe.FAMILY.mtp_settings,
    expert_layout=ExpertLayout.FUSED_OUT_IN,
)
