"""Run on each rank: a model of transformers in a torch pipeline, against the same model without one."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from megatron_vlbridge import split_global_batch
from megatron_vlbridge.integrations import MediaStage, media_kwargs
from tests import pipeline_models, reference
from tests.closeness import relative_error

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
# Schedule, micro-batches, form of the call, counts, tokens of padding.
Run = tuple[str, int, str, str, int]
# For each sample its images and videos.
COUNTS: dict[str, list[tuple[int, int]]] = {
    "mixed": [(2, 0), (0, 1), (0, 0), (1, 1)],
    "text first": [(0, 0), (0, 0), (1, 0), (0, 1)],
    "text around": [(0, 0), (2, 1), (0, 0), (0, 0)],
    "images": [(1, 0), (2, 0), (0, 0), (1, 0)],
    "videos": [(0, 1), (0, 0), (0, 2), (0, 1)],
    "text last": [(1, 1), (0, 2), (1, 0), (0, 0)],
    "text": [(0, 0)] * 4,
}


@functools.cache
def example() -> Any:
    """The module of the example."""
    path = Path(__file__).parents[2] / "examples" / "torch_pipeline.py"
    spec = importlib.util.spec_from_file_location("torch_pipeline_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def part_of(kind: str, index: int, num_stages: int) -> tuple[nn.Module, dict[nn.Parameter, str]]:
    """A stage as the example cuts it, and the names of its parameters in the model."""
    model = pipeline_models.build(kind)
    names = {parameter: name for name, parameter in model.named_parameters()}
    part = example().Part(model, index, num_stages)
    return part, {parameter: names[parameter] for parameter in part.parameters()}


class Pipeline:
    """The stages of this rank under a schedule."""

    def __init__(self, kind: str, schedule: str, n: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        of_rank = 2 if schedule == "interleaved" else 1
        self.names: dict[nn.Parameter, str] = {}
        self.stages = []
        for index in range(rank, of_rank * world, world):
            part, names = part_of(kind, index, of_rank * world)
            self.names |= names
            self.stages.append(PipelineStage(MediaStage(part), index, of_rank * world, torch.device("cpu")))
        self.supervised = 1
        self.schedule = SCHEDULES[schedule](
            self.stages if of_rank > 1 else self.stages[0], n, loss_fn=self.loss, scale_grads=False
        )
        self.n, self.first, self.last = n, self.stages[0].is_first, self.stages[-1].is_last

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return pipeline_models.loss_of(logits, labels, self.supervised)

    def run(self, batch: dict[str, Tensor], form: str) -> tuple[float, Tensor | None]:
        """Loss and logits on the last stage; gradients stay in the parameters."""
        for parameter in self.names:
            parameter.grad = None
        self.supervised = int((batch["labels"] != -100).sum())
        losses: list[Tensor] = []
        target = batch["labels"] if self.last else None
        if form == "lists":
            logits = self._run_lists(batch, losses)
        else:
            keywords = media_kwargs(_without_media(batch) if form == "no pixels" and not self.first else batch)
            inputs = (batch["input_ids"],) if self.first else ()
            if form == "eval":
                with torch.no_grad():
                    logits = self.schedule.eval(*inputs, target=target, losses=losses, **keywords)
            else:
                logits = self.schedule.step(*inputs, target=target, losses=losses, **keywords)
        return float(sum(losses)), logits

    def _run_lists(self, batch: dict[str, Tensor], losses: list[Tensor]) -> None:
        """A loop that has a list of micro-batches, as `step` has after cutting."""
        parts = split_global_batch(batch, self.n)
        inputs = [(part["input_ids"],) if self.first else () for part in parts]
        for stage in self.stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        targets = [part["labels"] for part in parts] if self.last else None
        keywords = [{key: x for key, x in part.items() if key not in ("input_ids", "labels")} for part in parts]
        self.schedule._step_microbatches(inputs, keywords, targets, losses)


def _without_media(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("position_ids", "attention_mask", "labels") if key in batch}


def compare(_: Any, kind: str, runs: Sequence[Run]) -> dict[str, float]:
    """The relative errors of loss, logits and gradients in each run.

    Schedules are kept from run to run, as in training; so the batch that a schedule began with differs.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    with reference.recurrent_delta_rule():
        return _compare(kind, runs)


def _compare(kind: str, runs: Sequence[Run]) -> dict[str, float]:
    errors: dict[str, float] = {}
    pipelines: dict[tuple[str, int], Pipeline] = {}
    references: dict[tuple[str, int], Any] = {}
    for schedule, n, form, counts, padding in runs:
        batch = pipeline_models.batch_of(kind, _for(kind, COUNTS[counts]), len(counts), padding)
        key = counts, padding
        references[key] = references.get(key) or pipeline_models.without_pipeline(kind, batch)
        loss, gradients, logits = references[key]
        pipeline = pipelines.get((schedule, n)) or pipelines.setdefault((schedule, n), Pipeline(kind, schedule, n))
        found, found_logits = pipeline.run(batch, form)
        label = f"{schedule} {n} {form} {counts} {padding}"
        if pipeline.last:
            errors[f"{label} loss"] = relative_error(found, loss)
            if found_logits is not None:
                errors[f"{label} logits"] = relative_error(found_logits, logits)
        for parameter, name in pipeline.names.items():
            if form == "eval" or name not in gradients:
                assert parameter.grad is None, name
            else:
                assert parameter.grad is not None, f"{label} {name}"
                errors[f"{label} {name}"] = relative_error(parameter.grad, gradients[name])
    return errors


def _for(kind: str, counts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(images, 0) for images, _ in counts] if kind in pipeline_models.IMAGES_ONLY else counts


def run_page(_: Any, code: str) -> dict[str, float]:
    """The relative errors of the gradients after the code on the page, for one batch."""
    rank, kind = dist.get_rank(), "qwen3_vl"
    part, parameters = part_of(kind, rank, 2)
    batch = pipeline_models.batch_of(kind, COUNTS["mixed"], 1)
    loss, gradients, _logits = pipeline_models.without_pipeline(kind, batch)
    names: dict[str, Any] = {"part": part, "rank": rank, "num_stages": 2, "device": torch.device("cpu")}
    names |= {"config": pipeline_models.config_of(kind), "batches": [batch], "optimizer": _Keeps()}
    exec(code, names)
    errors = {name: relative_error(parameter.grad, gradients[name]) for parameter, name in parameters.items()}
    return errors | ({"loss": relative_error(float(sum(names["losses"])), loss)} if rank else {})


class _Keeps:
    """An optimizer that leaves weights and gradients."""

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...
