"""Dense Qwen3-VL (2B, 4B, 8B, 32B)."""

from megatron_vlbridge.families.family import Family, combinations
from megatron_vlbridge.families.qwen3_vl.config import CONFIG
from megatron_vlbridge.families.qwen3_vl.fields import language_fields, vision_fields
from megatron_vlbridge.families.qwen3_vl.rules import EMBEDDING, HF_LAYERS, rules

# The choices that are independent of the experts; each is run with and without recomputation (full, selective),
# multi-token prediction and tied embeddings.
PIPELINES, CONTEXTS = ("", "pp", "pp vpp"), ("", "cp")

FAMILY = Family(
    config=CONFIG,
    rules=rules,
    embedding=EMBEDDING,
    head="lm_head.weight",
    layers=HF_LAYERS,
    language_fields=language_fields,
    vision_fields=vision_fields,
    combinations=combinations(("", "tp", "tp sp"), PIPELINES, CONTEXTS),
)
