"""The tensors of LoRA adapters in Megatron's checkpoints: in the shapes of whole Hugging Face weights."""

from collections.abc import Collection, Mapping

from megatron_vlbridge.weights.regions import Shape
from megatron_vlbridge.weights.rules import Copy, RuleTable

HALVES = ("A", "B")
PREFIX = "adapter/"


def adapter_tensor(weight: str, half: str) -> str:
    """The name of A or B of a weight in a checkpoint, without the dots by which layers would be stacked.

    Example: `adapter_tensor("lm_head.weight", "A")` is `"adapter/lm_head/weight/lora_A"`.
    """
    return f"{PREFIX}{weight.replace('.', '/')}/lora_{half}"


def weight_of(name: str) -> str:
    """The weight of a tensor that `adapter_tensor` names."""
    return name.removeprefix(PREFIX).rpartition("/")[0].replace("/", ".")


def adapter_shape(weight_shape: Shape, half: str, rank: int) -> Shape:
    """A `[rank, in]` or B `[out, rank]` of a weight `[out, in]`; of experts `[E, out, in]` with their axis."""
    *lead, rows, columns = weight_shape
    return (*lead, rank, columns) if half == "A" else (*lead, rows, rank)


def adapter_table(shapes: Mapping[str, Shape], weights: Collection[str], rank: int) -> RuleTable:
    """The rule table of the adapters of some weights, with the same names on both sides.

    `shapes` are those of the weights, as transformers holds them.
    """
    names = [(weight, half, adapter_tensor(weight, half)) for weight in weights for half in HALVES]
    return RuleTable(Copy(name, name, adapter_shape(shapes[weight], half, rank)) for weight, half, name in names)
