"""How Hugging Face and Megatron tensors correspond: invertible rules over regions, and the plan that proves them."""

from megatron_vlbridge.weights.plan import Plan, TensorSpec
from megatron_vlbridge.weights.regions import Move, Piece, Region, stack_layers
from megatron_vlbridge.weights.rules import Copy, GateUp, GroupedQkv, Rule, RuleTable, VisionQkv

__all__ = [
    "Copy",
    "GateUp",
    "GroupedQkv",
    "Move",
    "Piece",
    "Plan",
    "Region",
    "Rule",
    "RuleTable",
    "TensorSpec",
    "VisionQkv",
    "stack_layers",
]
