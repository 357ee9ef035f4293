"""The models that are compared with transformers under every layout, one entry for each family.

What a checkpoint of a kind holds is in `tests.reference.KINDS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.functional.pool import Layout


@dataclass(frozen=True)
class Variant:
    """What is done within one layout: recomputation, multi-token prediction, tied embeddings, a padded batch."""

    recompute: str = ""
    mtp: bool = False
    tied: bool = False
    padded: bool = False

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Fields of Megatron's config."""
        full = {"recompute_granularity": "full", "recompute_num_layers": 1}
        return {
            "": {},
            "uniform": full | {"recompute_method": "uniform"},
            "block": full | {"recompute_method": "block"},
            "selective": {"recompute_granularity": "selective"},
        }[self.recompute]

    def __str__(self) -> str:
        names = [f"recompute {self.recompute}"] * bool(self.recompute)
        names += [name for name in ("mtp", "tied", "padded") if getattr(self, name)]
        return " ".join(names) or "plain"


@dataclass(frozen=True)
class Kind:
    """The rows of a family.

    Of `tensors`, the choices of tensor and expert parallelism, the product with pipelines and contexts is run; `others`
    are other sizes and splits of its combinations. `small` has every pair of dimensions; `make test` runs it of some
    kinds, `make test-layouts` all rows of all, with all variants or, where `every_variant` is false, with two of them
    and those of `small`.
    """

    model: str
    tensors: tuple[dict[str, Any], ...]
    others: tuple[Layout, ...]
    small: tuple[tuple[Layout, Variant], ...]
    every_variant: bool = False

    @property
    def experts(self) -> bool:
        """Whether the model has experts."""
        return any("ep" in choice for choice in self.tensors)


_TENSORS: tuple[dict[str, Any], ...] = ({}, {"tp": 2}, {"tp": 2, "sp": True})
_EXPERTS: tuple[dict[str, Any], ...] = (
    {},
    {"ep": 2},
    {"tp": 2, "sp": True, "etp": 1},
    {"tp": 2, "sp": True, "etp": 2},
    {"tp": 2, "sp": True, "ep": 2, "etp": 1},
    {"tp": 2, "sp": True, "ep": 2, "etp": 2},
)

# Data parallel, more ranks than KV heads, uneven stages, layout strings that leave the first stage without a layer,
# deepstack over three stages and over the chunks of one.
_OTHERS = (
    Layout(world=2),
    Layout(tp=2, world=4),
    Layout(tp=2, sp=True, world=4),
    Layout(pp=2, world=4),
    Layout(cp=2, world=4),
    Layout(tp=2, sp=True, cp=2, world=8),
    Layout(tp=2, sp=True, pp=2, world=8),
    Layout(pp=2, cp=2, world=8),
    Layout(pp=2, vpp=2, world=4),
    Layout(tp=4, world=4),
    Layout(tp=4, sp=True, world=4),
    Layout(cp=4, world=4),
    Layout(pp=4, world=4),
    Layout(tp=2, sp=True, pp=4, world=8),
    Layout(pp=4, cp=2, world=8),
    Layout(pp=2, stages="Et|tttL", world=2),
    Layout(pp=4, stages="E|tt|tt|L", world=4),
    Layout(pp=2, vpp=2, stages="Ett|t|t|L", world=2),
    Layout(tp=2, sp=True, pp=2, stages="Ettt|tL", world=4),
)
_EXPERT_OTHERS = (
    Layout(world=2),
    Layout(tp=2, sp=True, etp=1, world=4),
    Layout(ep=2, world=4),
    Layout(ep=4, world=4),
    Layout(ep=4, pp=2, world=8),
    Layout(ep=2, pp=4, world=8),
    Layout(ep=2, pp=2, stages="Ettt|tL", world=4),
    Layout(ep=2, cp=2, world=8),
)
# Every pair of dimensions, with and without each of the two.
_PAIRS = (
    (Layout(), Variant(mtp=True, tied=True)),
    (Layout(tp=2, sp=True, world=2), Variant("uniform", mtp=True)),
    (Layout(tp=2, sp=True, world=4), Variant(padded=True)),
    (Layout(tp=2, pp=2, vpp=2, world=4), Variant("block", mtp=True, tied=True, padded=True)),
    (Layout(pp=2, vpp=2, world=4), Variant(padded=True)),
    (Layout(pp=2, cp=2, world=4), Variant("selective", mtp=True, tied=True)),
    (Layout(cp=2, world=2), Variant("uniform")),
    (Layout(cp=2, world=4), Variant("block", mtp=True, tied=True)),
    (Layout(cp=4, world=4), Variant()),
    (Layout(tp=2, sp=True, pp=2, vpp=2, cp=2, world=8), Variant("uniform", tied=True)),
)
_EXPERT_PAIRS = (
    (Layout(world=2), Variant(padded=True)),
    (Layout(tp=2, sp=True, ep=2, etp=1, world=2), Variant("selective", tied=True)),
    (Layout(pp=2, vpp=2, world=2), Variant(mtp=True)),
    (Layout(tp=2, sp=True, pp=2, vpp=2, ep=2, etp=2, world=8), Variant(padded=True)),
    (Layout(ep=2, cp=2, world=8), Variant("block", mtp=True, tied=True)),
    (Layout(tp=2, sp=True, cp=2, etp=2, world=4), Variant(mtp=True, tied=True)),
    (Layout(pp=2, world=2), Variant("block", mtp=True, tied=True, padded=True)),
    (Layout(pp=2, vpp=2, cp=2, world=4), Variant("selective")),
    (Layout(tp=2, sp=True, pp=2, vpp=2, etp=2, world=4), Variant("uniform", tied=True)),
)

# Uneven splits, deepstack over three stages and over the chunks of one: for models with deepstack.
_SPLITS = (
    (Layout(pp=4, world=4), Variant()),
    (Layout(pp=2, stages="Et|tttL", world=2), Variant("block", mtp=True, tied=True)),
    (Layout(pp=4, stages="E|tt|tt|L", world=4), Variant()),
    (Layout(pp=2, vpp=2, stages="Ett|t|t|L", world=2), Variant(padded=True)),
)
_EXPERT_SPLITS = (
    (Layout(ep=2, pp=4, world=8), Variant()),
    (Layout(ep=2, pp=2, stages="Ettt|tL", world=4), Variant("block", mtp=True, tied=True)),
)

KINDS = {
    "dense": Kind("Qwen3-VL", _TENSORS, _OTHERS, (*_PAIRS, *_SPLITS), every_variant=True),
    "experts": Kind("Qwen3-VL-MoE", _EXPERTS, _EXPERT_OTHERS, (*_EXPERT_PAIRS, *_EXPERT_SPLITS), every_variant=True),
    "linear": Kind("Qwen3.5", _TENSORS, _OTHERS, _PAIRS),
    "linear-experts": Kind("Qwen3.5-MoE", _EXPERTS, _EXPERT_OTHERS, _EXPERT_PAIRS),
}
