"""What a stage of a pipeline does with pixels, positions and gradients, found by running it."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Change:
    """The keywords of a micro-batch with other pixels of a sample's images or videos, and their `tokens` `[S]`."""

    kind: str
    sample: int
    keywords: dict[str, Any]
    tokens: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch as a schedule hands it to a stage; on the first stage with token ids `[b, S]` and changes."""

    keywords: dict[str, Any]
    position_ids: Tensor
    input_ids: Tensor | None = None
    changes: Sequence[Change] = ()


@dataclass(frozen=True)
class Like:
    """Shape and dtype of an output, from which the next stage makes its input."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, device: torch.device) -> Tensor:
        """Random hidden states, since only what happens to them matters; zeros if they are not floats."""
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, dtype=self.dtype, device=device).requires_grad_()
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """The tensors that a stage returns."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def towers(module: nn.Module) -> dict[str, nn.Module]:
    """The vision towers in a module by name, known by their attribute or class as in transformers."""
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        outside = not any(name.startswith(f"{tower}.") for tower in found)
        named = name.rpartition(".")[2] in ("visual", "vision_tower", "vision_model")
        if outside and (named or "Vision" in type(part).__name__):
            found[name] = part
    return found


def check_pixels(module: nn.Module, micro_batches: Sequence[MicroBatch]) -> list[str]:
    """Other pixels change the output of each of their tokens, and nothing before them or in other samples."""
    still, leaked = Counter[str](), Counter[str]()
    for part in micro_batches:
        if not part.changes:
            continue
        assert part.input_ids is not None
        before = outputs_of(module(part.input_ids, **part.keywords))[0]
        if before.shape[:2] != part.input_ids.shape:
            return [f"expected an output {[*part.input_ids.shape, 'H']}, found {list(before.shape)}"]
        # Experts with other tokens may round the same token differently.
        rounding = torch.finfo(before.dtype).eps ** 0.5 * before.abs().amax(-1)
        for change in part.changes:
            after = outputs_of(module(part.input_ids, **change.keywords))[0]
            moved = (after.double() - before.double()).abs().amax(-1)
            free = torch.ones_like(moved, dtype=torch.bool)
            free[change.sample] = change.tokens.cumsum(0) == 0
            still[change.kind] += int((moved[change.sample][change.tokens] == 0).sum())
            leaked[change.kind] += int((free & (moved > rounding)).sum())
    if not any(part.changes for part in micro_batches):
        return ["expected a batch with an image or video, found none. Check with one that has them"]
    found = ", ".join(towers(module)) or "none"
    return [
        f"expected other pixels of {kind}s to change the output of each of their tokens, found {count} tokens that did "
        f"not change. Its forward must pass pixels and grids to the vision tower of the first stage (found: {found})"
        for kind, count in still.items()
        if count
    ] + [
        f"expected other pixels of {kind}s to change only their tokens and later ones of their sample, found {count} "
        "more that changed. They got the media of another sample, or attend to later tokens"
        for kind, count in leaked.items()
        if count
    ]


def check_path(module: nn.Module, inputs: Sequence[Sequence[Tensor]], micro_batches: Sequence[MicroBatch]) -> list[str]:
    """Every parameter that requires a gradient, and every hidden state, has a path to the output."""
    with _without_gradients(module):
        for arguments, part in zip(inputs, micro_batches, strict=True):
            total = sum(
                x.float().sum() for x in outputs_of(module(*arguments, **part.keywords)) if x.is_floating_point()
            )
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()
        lost = [name for name, x in module.named_parameters() if x.requires_grad and x.grad is None]
        reached = {_any_expert(name) for name, x in module.named_parameters() if x.grad is not None}
    lost = [name for name in lost if _any_expert(name) not in reached]
    findings = []
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        findings.append(
            f"expected a path to the loss from every parameter that requires a gradient, found none from {shown}. Use "
            "them in its forward, or set requires_grad_(False)"
        )
    if any(x.requires_grad and x.grad is None for arguments in inputs for x in arguments):
        findings.append("expected a path to the loss from its input, found none: no earlier stage would learn")
    return findings


def _any_expert(name: str) -> str:
    """Experts that got no token have no gradient, which is no fault."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    kept = {parameter: parameter.grad for parameter in module.parameters()}
    for parameter in kept:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, gradient in kept.items():
            parameter.grad = gradient


@contextmanager
def other_positions(module: nn.Module, expected: Tensor) -> Iterator[list[str]]:
    """Collects the rotary embeddings of the language model that get other positions than those in `expected`."""
    findings: list[str] = []
    inside = tuple(towers(module).values())
    of_towers = {part for tower in inside for part in tower.modules()}
    hooks = []
    for name, part in module.named_modules():
        if type(part).__name__.endswith("RotaryEmbedding") and part not in of_towers:

            def compare(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                found = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
                if not isinstance(found, Tensor) or not _same(found, expected):
                    findings.append(name)

            hooks.append(part.register_forward_pre_hook(compare, with_kwargs=True))
    try:
        yield findings
    finally:
        for hook in hooks:
            hook.remove()


def _same(found: Tensor, expected: Tensor) -> bool:
    try:
        return bool(torch.equal(*torch.broadcast_tensors(found, expected.to(found.device))))
    except RuntimeError:
        return False


@contextmanager
def evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run without dropout; modes and random numbers are as before afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            yield
    finally:
        for part in training:
            part.training = True
