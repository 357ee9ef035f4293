"""The forms in which Hugging Face checkpoints store the experts of a layer, how to detect them, and their rules."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.weights import Copy, FusedExperts, Rule, SingleExperts, TensorSpec, gate_up

Shapes = tuple[tuple[int, int, int], tuple[int, int, int]]


class ExpertForm(StrEnum):
    """`E` experts of a layer with hidden size `H` and intermediate size `I`, gate before up in all forms."""

    FUSED_IN_OUT = "fused_in_out"
    """`experts.gate_up_proj` `[E, H, 2I]` and `experts.down_proj` `[E, I, H]`: Qwen3-VL on the Hub."""
    FUSED_OUT_IN = "fused_out_in"
    """`experts.gate_up_proj` `[E, 2I, H]` and `experts.down_proj` `[E, H, I]`: Qwen3-VL as transformers 5 saves it."""
    PER_EXPERT = "per_expert"
    """`experts.7.gate_proj.weight` and `up_proj.weight` `[I, H]`, `down_proj.weight` `[H, I]` for each expert."""


HUB = "hub"
"""Asks for the form that a family has on the Hub, which vLLM and sglang load."""


def fp8_form(config: Config, asked: str | None) -> str | None:
    """The form to ask for where experts are exported in FP8: each in tensors of its own; None without experts.

    Raises UsageError where another is asked for.
    """
    if asked not in (None, HUB, ExpertForm.PER_EXPERT):
        raise UsageError(
            f"experts: expected {ExpertForm.PER_EXPERT} with FP8, found {asked!r}. vLLM and sglang load no other form "
            "of FP8 experts: leave the option out."
        )
    return ExpertForm.PER_EXPERT if moe_layers(config) else asked


def detect_form(
    config: Config,
    hf: Mapping[str, TensorSpec],
    layers: str,
    default: ExpertForm,
    indexes: Sequence[int] | None = None,
) -> ExpertForm:
    """The form of the experts in a checkpoint whose tensors are `hf`; `default` where it has none.

    `layers` is the HF name of the layers, `indexes` which of them have experts (default: those of the decoder). Names
    tell fused from single experts, and both full shapes tell the orientation; other layers than the first with both
    tensors are left to the plan.

    Raises VLBridgeError, naming tensors and shapes, where the orientation cannot be known or neither fits.
    """
    names = _find_fused(config, hf, layers, indexes)
    if names is not None:
        return _orientation(config, names, (hf[names[0]], hf[names[1]]))
    return ExpertForm.PER_EXPERT if has_single_experts(hf, layers) else default


def detect_form_by_names(
    config: Config, hf: Collection[str], layers: str, indexes: Sequence[int] | None = None
) -> ExpertForm | None:
    """A form whose tensors have the names in `hf`, whatever the orientation of fused ones; None without experts.

    `layers` and `indexes` are those of `detect_form`.
    """
    if _find_fused(config, hf, layers, indexes) is not None:
        return ExpertForm.FUSED_IN_OUT
    return ExpertForm.PER_EXPERT if has_single_experts(hf, layers) else None


def has_single_experts(hf: Iterable[str], layers: str) -> bool:
    """Whether a checkpoint with these tensors holds each expert of those layers in tensors of its own."""
    single = re.compile(rf"{re.escape(layers)}\.\d+\.mlp\.experts\.\d+\.")
    return any(map(single.match, hf))


def moe_layers(config: Config) -> list[int]:
    """The decoder layers, counted from 0, that have experts."""
    return [layer for layer, kind in enumerate(config.text.layer_kinds) if kind.experts]


def expert_rules(config: Config, form: ExpertForm, hf: str, megatron: str, layer: int | None) -> list[Rule]:
    """The rules of one layer's router and experts; `hf` and `megatron` are the names of its MLP.

    The shared expert of a family that has one is among them.
    """
    assert config.text.moe is not None
    experts, hidden, inner = config.text.moe.num_experts, config.text.hidden_size, config.text.moe.moe_intermediate_size
    fc1, fc2 = (f"{megatron}.experts.experts.linear_{part}.weight" for part in ("fc1", "fc2"))
    shape1, shape2 = (experts, 2 * inner, hidden), (experts, hidden, inner)
    result: list[Rule] = [Copy(f"{hf}.gate.weight", f"{megatron}.router.weight", (experts, hidden), layer)]
    if shared := config.text.moe.shared_expert_intermediate_size:
        result += _shared_expert_rules(hidden, shared, hf, megatron, layer)
    if form is ExpertForm.PER_EXPERT:
        gate, up, down = (f"{hf}.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down"))
        return [*result, SingleExperts((gate, up), fc1, shape1, layer), SingleExperts((down,), fc2, shape2, layer)]
    transposed = form is ExpertForm.FUSED_IN_OUT
    return [
        *result,
        FusedExperts(f"{hf}.experts.gate_up_proj", fc1, shape1, layer, transposed),
        FusedExperts(f"{hf}.experts.down_proj", fc2, shape2, layer, transposed),
    ]


def _shared_expert_rules(hidden: int, inner: int, hf: str, megatron: str, layer: int | None) -> list[Rule]:
    """The expert that every token goes through, and its sigmoid gate."""
    expert, to = f"{hf}.shared_expert", f"{megatron}.shared_experts"
    gate, up = f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight"
    return [
        gate_up(gate, up, f"{to}.linear_fc1.weight", inner, (hidden,), layer),
        Copy(f"{expert}.down_proj.weight", f"{to}.linear_fc2.weight", (hidden, inner), layer),
        Copy(f"{hf}.shared_expert_gate.weight", f"{to}.gate_weight", (1, hidden), layer),
    ]


def _find_fused(
    config: Config, hf: Collection[str], layers: str, indexes: Sequence[int] | None
) -> tuple[str, str] | None:
    """The names of both fused tensors of the first layer that has them."""
    for layer in moe_layers(config) if indexes is None else indexes:
        names = f"{layers}.{layer}.mlp.experts.gate_up_proj", f"{layers}.{layer}.mlp.experts.down_proj"
        if all(name in hf for name in names):
            return names
    return None


def _orientation(config: Config, names: tuple[str, str], specs: tuple[TensorSpec, TensorSpec]) -> ExpertForm:
    assert config.text.moe is not None
    experts, hidden, inner = config.text.moe.num_experts, config.text.hidden_size, config.text.moe.moe_intermediate_size
    expected: dict[ExpertForm, Shapes] = {
        ExpertForm.FUSED_IN_OUT: ((experts, hidden, 2 * inner), (experts, inner, hidden)),
        ExpertForm.FUSED_OUT_IN: ((experts, 2 * inner, hidden), (experts, hidden, inner)),
    }
    matching = [form for form, shapes in expected.items() if shapes == (specs[0].shape, specs[1].shape)]
    text = " or ".join(f"{list(first)} and {list(second)} ({form})" for form, (first, second) in expected.items())
    found = f"{names[0]} and {names[1]}: expected {text}, found {list(specs[0].shape)} and {list(specs[1].shape)}"
    # A square tensor hides its orientation, and the other is no evidence: transformers 5 transposes each of the two by
    # its own shape alone, so a file that it wrote may hold one transposed and the other not.
    if matching and hidden in (inner, 2 * inner):
        choices = " or ".join(f'experts="{form}" (--experts {form})' for form in expected)
        raise VLBridgeError(
            f"{found}. The hidden size {hidden} makes one of them square, so that the orientation cannot be seen: "
            f"say which it is with {choices}."
        )
    if not matching:
        raise VLBridgeError(f"{found}. Use the config.json that belongs to these weights.")
    return matching[0]
