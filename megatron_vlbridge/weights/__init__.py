"""How Hugging Face and Megatron tensors correspond: invertible rules over regions, and the plan that proves them."""

from megatron_vlbridge.weights.plan import Plan, TensorSpec
from megatron_vlbridge.weights.regions import Move, Piece, Region, mixed_stacks, stack_layers
from megatron_vlbridge.weights.rules import (
    Copy,
    FusedExperts,
    RowBlocks,
    Rule,
    RuleTable,
    SingleExperts,
    SplitRows,
    gate_up,
    grouped_qkv,
    vision_qkv,
)

__all__ = [
    "Copy",
    "FusedExperts",
    "Move",
    "Piece",
    "Plan",
    "Region",
    "RowBlocks",
    "Rule",
    "RuleTable",
    "SingleExperts",
    "SplitRows",
    "TensorSpec",
    "gate_up",
    "grouped_qkv",
    "mixed_stacks",
    "stack_layers",
    "vision_qkv",
]
