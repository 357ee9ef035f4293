"""Qwen3-VL with experts (30B-A3B, 235B-A22B)."""

from dataclasses import replace

from megatron_vlbridge.families import qwen3_vl
from megatron_vlbridge.families.family import combinations
from megatron_vlbridge.families.qwen3_vl_moe.config import CONFIG, language_fields

FAMILY = replace(
    qwen3_vl.FAMILY,
    config=CONFIG,
    language_fields=language_fields,
    combinations=combinations(
        ("", "ep", "tp sp", "tp sp etp", "tp sp ep", "tp sp ep etp"), qwen3_vl.PIPELINES, qwen3_vl.CONTEXTS
    ),
    mtp_settings={"moe_aux_loss_coeff": (0, None), "moe_z_loss_coeff": (0, None)},
)
