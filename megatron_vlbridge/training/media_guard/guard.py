"""Before the first optimizer step: no stage trains without its images, with wrong positions, or on other packs.

`vlm_step` is called by the ranks at different times, so it must not wait for another pipeline stage. What it finds at
its first call it keeps, and all ranks compare at the end of the iteration, where they meet: before Megatron finalizes
the gradients (`config.finalize_model_grads_func`). Where no such call will come, a finding is raised at once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model, get_model_config, unwrap_model

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.inputs import PackedInputs
from megatron_vlbridge.model.inputs.digest import PackDigest
from megatron_vlbridge.model.vision.tower import VisionModel
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.media_guard.agreement import difference, gather, largest
from megatron_vlbridge.training.media_guard.probe import check_pixels

# Packs in an iteration of which the digests are kept.
_PACKS = 4096


class MediaGuard:
    """What is known of a stage (a model chunk): its findings, the packs that it read, and what its backward reached."""

    def __init__(self, stage: Qwen3VLModel) -> None:
        number = stage.pg_collection.pp.rank()
        chunk = "" if stage.vp_stage is None else f", model chunk {stage.vp_stage}"
        self.name = f"pipeline stage {number}{chunk}"
        self.findings: list[str] = []
        self.digests: deque[PackDigest] = deque(maxlen=_PACKS)
        self._probed = False
        self._bypassed = self._detached = False
        self._ran: set[bool] = set()
        self._unreached: dict[str, torch.nn.Parameter] = {}
        self._hooks: list[Any] = []

    def begin(self, model: torch.nn.Module) -> None:
        """At the first call, check the pixels of a first stage, and that no other stage has a tower.

        Raises VLBridgeError: where the findings cannot wait.
        """
        config = get_model_config(model)
        if config.finalize_model_grads_func is not None and not isinstance(config.finalize_model_grads_func, Meeting):
            config.finalize_model_grads_func = Meeting(config.finalize_model_grads_func)
        if self._probed:
            return
        stage = stage_of(model)
        if stage.pre_process:
            try:
                with _keywords(stage):
                    findings = check_pixels(model, stage)
            except _DroppedError as error:
                findings, self._bypassed = [str(error)], True
        else:
            findings = [
                f"expected the vision tower on the first stage only, found {name}. Build it only with pre_process"
                for name, part in stage.named_modules()
                if isinstance(part, VisionModel)
            ]
        self._report(findings, model)
        self._probed = True

    def forward(self, model: torch.nn.Module, inputs: PackedInputs) -> torch.Tensor:
        """The output of `model`; the first time, check its positions and its path to what it received.

        Raises VLBridgeError: where the findings cannot wait.
        """
        if inputs.digest is not None:
            self.digests.append(inputs.digest)
        stage, training = stage_of(model), torch.is_grad_enabled()
        received = stage.received
        if training in self._ran:
            output: torch.Tensor = (stage if self._bypassed else model)(inputs=inputs)
        else:
            output = self._first_output(model, stage, inputs)
            self._ran.add(training)
        # So that the previous stage gets a gradient, and does not wait for it forever.
        return output + 0 * received.sum() if self._detached and received is not None else output

    def _first_output(self, model: torch.nn.Module, stage: Qwen3VLModel, inputs: PackedInputs) -> torch.Tensor:
        training, received = torch.is_grad_enabled(), stage.received
        with _positions(stage, inputs) as findings:
            output: torch.Tensor | None = None
            if not self._bypassed:
                try:
                    with _keywords(stage):
                        output = model(inputs=inputs)
                except _DroppedError as error:
                    findings.append(str(error))
                    # Without what wraps the stage, for the other ranks to reach the end of the iteration too.
                    self._bypassed = True
            if output is None:
                output = stage(inputs=inputs)
        if training and received is not None and received.requires_grad and not _depends(output, received):
            self._detached = True
            findings.append(
                "expected a path from its output to the hidden states that it received, found none: no earlier stage "
                "would learn. Do not detach them"
            )
        self._report(findings, model)
        if _is_compared(model):
            self._watch(unwrap_model(model))
        return output

    def end_iteration(self) -> list[str]:
        """What is wrong; after the first iteration that includes parameters that got no gradient."""
        for hook in self._hooks:
            hook.remove()
        # A gradient that Megatron wrote to the buffer itself is no event of autograd.
        names = sorted(name for name, parameter in self._unreached.items() if not _has_gradient(parameter))
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.findings.append(
                f"{self.name}: expected a path to the loss from every parameter that requires a gradient, found none "
                f"from {shown}. Use them in the forward, or set requires_grad_(False) before Megatron's DDP"
            )
        self._hooks, self._unreached = [], {}
        return self.findings

    def _report(self, findings: Sequence[str], model: torch.nn.Module) -> None:
        named = [f"{self.name} ({type(unwrap_model(model)).__name__}): {text}" for text in findings]
        if named and not _is_compared(model):
            raise _error(named)
        self.findings += named

    def _watch(self, module: torch.nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._unreached[name] = parameter
                self._hooks.append(parameter.register_hook(partial(self._reach, name)))

    def _reach(self, name: str, gradient: torch.Tensor) -> None:
        self._unreached.pop(name, None)


class Meeting:
    """Megatron's `finalize_model_grads_func`, before which all ranks compare what they found and read."""

    def __init__(self, finalize: Callable[..., Any]) -> None:
        self.finalize = finalize

    def __call__(self, model: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        """Raises VLBridgeError, the same on all ranks: all findings, or that packs differ between ranks."""
        check_iteration([stage_of(chunk) for chunk in model])
        return self.finalize(model, *args, **kwargs)


def check_iteration(chunks: Sequence[Qwen3VLModel]) -> None:
    """Raise on all ranks what any of them found in its `chunks`, or that they read different packs."""
    guards = [guard_of(chunk) for chunk in chunks]
    groups = chunks[0].pg_collection
    findings = [text for guard in guards for text in guard.end_iteration()]
    read = {guard.name: list(guard.digests) for guard in guards}
    for guard in guards:
        guard.digests.clear()
    value = hash(tuple(digest.value for digest in read[guards[0].name]))
    wrong = bool(findings) or difference(read) is not None
    state = largest(largest((wrong, value, -value), groups.pp), groups.cp)
    wrong = bool(state[0]) or state[1] != -state[2]
    if not largest(largest((wrong,), groups.tp), groups.dp_cp)[0]:
        return
    everyone = [(findings, groups.dp.rank(), groups.cp.rank(), read)]
    for group in (groups.tp, groups.pp, groups.dp_cp):
        everyone = [entry for entries in gather(everyone, group) for entry in entries]
    found = [text for texts, *_ in everyone for text in texts]
    replicas: dict[int, dict[str, list[PackDigest]]] = {}
    for _, replica, cp_rank, packs in everyone:
        where = f", context-parallel rank {cp_rank}" if groups.cp.size() > 1 else ""
        replicas.setdefault(replica, {}).update({name + where: digests for name, digests in packs.items()})
    found += [text for packs in replicas.values() if (text := difference(packs)) is not None]
    raise _error(found)


def _is_compared(model: torch.nn.Module) -> bool:
    """Whether the ranks will compare at the end of an iteration. Megatron reads the config of the first chunk."""
    follows = bool(stage_of(model).vp_stage) or get_model_config(model).finalize_model_grads_func is not None
    return follows and torch.is_grad_enabled()


def guard_of(stage: Qwen3VLModel) -> MediaGuard:
    """The guard of a stage."""
    if stage.media_guard is None:
        stage.media_guard = MediaGuard(stage)
    guard: MediaGuard = stage.media_guard
    return guard


def stage_of(model: torch.nn.Module) -> Qwen3VLModel:
    """The stage inside what wraps it."""
    stage: Qwen3VLModel = get_attr_wrapped_model(model, "hf_config", return_model_obj=True)
    return stage


def _error(findings: Sequence[str]) -> VLBridgeError:
    texts = "\n".join(f"- {text}" for text in dict.fromkeys(findings))
    return VLBridgeError(f"rejected before an optimizer step:\n{texts}")


class _DroppedError(Exception):
    """A wrapper dropped the inputs."""


@contextmanager
def _keywords(stage: Qwen3VLModel) -> Iterator[None]:
    """A wrapper that drops the inputs is an error with its cause."""

    def check(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not isinstance(kwargs.get("inputs"), PackedInputs):
            raise _DroppedError(
                f"expected the keyword `inputs` of vlm_step in the forward of {type(stage).__name__}, found "
                f"{', '.join(kwargs) or 'none'}. What wraps it must pass on all keywords: def forward(self, *args, "
                "**kwargs): return self.module(*args, **kwargs)"
            )

    hook = stage.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _positions(stage: Qwen3VLModel, inputs: PackedInputs) -> Iterator[list[str]]:
    """Collects what is wrong with the positions that the decoder gets in this block."""
    findings: list[str] = []
    tables: list[Any] = []

    def keep(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
        tables.append(kwargs.get("rotary_pos_emb"))

    hook = stage.language_model.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield findings
    finally:
        hook.remove()
    expected = stage.language_model.rotary_table(inputs.position_ids)
    if not tables:
        findings.append("expected a forward that runs the decoder, found that it did not run. Call it")
    elif any(not isinstance(table, torch.Tensor) or not torch.equal(table, expected) for table in tables):
        findings.append(
            "expected the positions of the pack (time, row, column) in the decoder, found others. Pass on the "
            "position_ids of `inputs`, on every stage"
        )


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    gradients = (parameter.grad, getattr(parameter, "main_grad", None))
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _depends(output: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether `leaf` gets a gradient in the backward of `output`."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
    return False
