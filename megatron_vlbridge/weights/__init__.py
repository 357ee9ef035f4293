"""How Hugging Face and Megatron tensors correspond: invertible rules over regions, and the plan that proves them."""

from megatron_vlbridge.weights.plan import Plan, TensorSpec
from megatron_vlbridge.weights.regions import Move, Piece, Region, mixed_stacks, stack_layers
from megatron_vlbridge.weights.rules import (
    Copy,
    FusedExperts,
    GateUp,
    GroupedQkv,
    Rule,
    RuleTable,
    SingleExperts,
    SplitRows,
    VisionQkv,
)

__all__ = [
    "Copy",
    "FusedExperts",
    "GateUp",
    "GroupedQkv",
    "Move",
    "Piece",
    "Plan",
    "Region",
    "Rule",
    "RuleTable",
    "SingleExperts",
    "SplitRows",
    "TensorSpec",
    "VisionQkv",
    "mixed_stacks",
    "stack_layers",
]
