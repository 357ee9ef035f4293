"""Qwen3-VL with experts (30B-A3B, 235B-A22B)."""

from megatron_vlbridge.families import qwen3_vl
from megatron_vlbridge.families.family import Family, combinations
from megatron_vlbridge.families.qwen3_vl_moe.config import CONFIG
from megatron_vlbridge.families.qwen3_vl_moe.fields import language_fields
from megatron_vlbridge.families.qwen3_vl_moe.rules import rules

FAMILY = Family(
    config=CONFIG,
    rules=rules,
    embedding=qwen3_vl.FAMILY.embedding,
    head=qwen3_vl.FAMILY.head,
    layers=qwen3_vl.FAMILY.layers,
    language_fields=language_fields,
    vision_fields=qwen3_vl.FAMILY.vision_fields,
    combinations=combinations(
        ("", "ep", "tp sp", "tp sp etp", "tp sp ep", "tp sp ep etp"), qwen3_vl.PIPELINES, qwen3_vl.CONTEXTS
    ),
    mtp_settings={"moe_aux_loss_coeff": (0, None), "moe_z_loss_coeff": (0, None)},
)
