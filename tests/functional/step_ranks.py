"""Functions run in the workers: single stages, padded batches and training steps with Megatron's options."""

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_vlbridge import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.batch import next_inputs, read_pack
from megatron_vlbridge.training.step import vlm_step
from tests.functional import ranks
from tests.functional.pool import Layout

Pack = Mapping[str, torch.Tensor]


def read_each(layout: Layout, folder: Path, packs: Sequence[Pack]) -> list[str | int]:
    """For each pack that this rank reads: the error, or the number of its tokens."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups, first = ProcessGroupCollection.use_mpu_process_groups(), parallel_state.is_pipeline_first_stage()
    iterator = iter([_with_axis(pack) for pack in packs]) if groups.tp.rank() == 0 else None
    results: list[str | int] = []
    for _ in packs:
        try:
            read = next_inputs(iterator, read_config(folder), groups, pre_process=first, post_process=not first)
            results.append(read.tokens.numel())
        except VLBridgeError as error:
            results.append(str(error))
    return results


def what_a_stage_reads(layout: Layout, folder: Path, pack: Pack) -> dict[str, int]:
    """The numbers of patches and labels that this rank gets from a pack, and the pickled size of the header."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups, sent, broadcast = ProcessGroupCollection.use_mpu_process_groups(), [], dist.broadcast_object_list
    stage = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }

    def recorded(header: list[Any], **kwargs: Any) -> None:
        broadcast(header, **kwargs)
        sent.append(len(pickle.dumps(header)))

    dist.broadcast_object_list = recorded
    try:
        iterator = iter([_with_axis(pack)]) if groups.tp.rank() == 0 else None
        read = next_inputs(iterator, read_config(folder), groups, **stage)
    finally:
        dist.broadcast_object_list = broadcast
    labels = 0 if read.labels is None else read.labels.numel()
    return {"patches": read.patches.shape[0], "labels": labels, "header": max(sent)}


def build_with_fixed_lengths(layout: Layout, folder: Path, **overrides: Any) -> str:
    """The error of this rank's model with stages that exchange tensors of one length."""
    config = ranks.build_model(layout, folder, load=False, **overrides).config
    config.variable_seq_lengths = False
    try:
        Qwen3VLModel(config, read_config(folder), pre_process=False, post_process=False)
    except VLBridgeError as error:
        return str(error)
    return ""


def run_and_catch(layout: Layout, folder: Path, packs: Sequence[Pack], **options: Any) -> str:
    """The error of the first stage for these packs, or an empty string."""
    model = ranks.build_model(layout, folder, load=False, **options)
    try:
        for pack in packs if model.pre_process else ():
            model(inputs=read_pack(_with_axis(pack), model.hf_config))
    except VLBridgeError as error:
        return str(error)
    return ""


def first_stage(layout: Layout, folder: Path, packs: Sequence[Pack]) -> list[torch.Tensor]:
    """The output of the first stage for each pack, `[T, ...]`: hidden states, or logits if it is the only stage."""
    model = ranks.build_model(layout, folder)
    if not model.pre_process:
        return []
    inputs = [replace(read_pack(_with_axis(pack), model.hf_config), labels=None) for pack in packs]
    outputs = [model(inputs=x).detach() for x in inputs]
    return [x[0] if model.post_process else x[:, 0] for x in outputs]


def padded(layout: Layout, folder: Path, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The output of the whole model for a padded batch; this rank's shard of the logits."""
    output: torch.Tensor = ranks.build_model(layout, folder)(**batch)
    return output.detach()


def padded_errors(layout: Layout, folder: Path, calls: Sequence[Mapping[str, Any]]) -> list[str]:
    """The type and message of the error of each call of the model, or an empty string."""
    model = ranks.build_model(layout, folder)
    errors = []
    for arguments in calls:
        try:
            model(**arguments)
            errors.append("")
        except (VLBridgeError, TypeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def train_step(
    layout: Layout,
    folder: Path,
    packs: Sequence[Pack],
    *,
    before: Sequence[Pack] = (),
    frozen: Sequence[str] = (),
    **overrides: Any,
) -> dict[str, Any]:
    """Forward and backward of one step: loss reports, gradients, and how often the first layer of each module ran.

    `before`: packs of an earlier step, in which Megatron's DDP counts the gradients of each parameter; in later steps
    it reduces the gradient of a parameter during backward as soon as that count is reached. `frozen`: prefixes of the
    names of parameters without gradients.
    """
    model = ranks.build_model(layout, folder, **overrides)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(tuple(frozen))
    overlap = DistributedDataParallelConfig(overlap_grad_reduce=bool(before))
    wrapped = DistributedDataParallel(model.config, overlap, model)
    model.config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=model.pg_collection)
    if before:
        model.config.no_sync_func = wrapped.no_sync
        ranks._run(wrapped, vlm_step, ranks._mine(before), forward_only=False)
        wrapped.zero_grad_buffer()
    calls = _count_first_layers(model)
    reports = ranks._run(wrapped, vlm_step, ranks._mine(packs), forward_only=False)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.main_grad = torch.zeros_like(parameter)
    return {
        "reports": [report["lm loss"] for report in reports],
        "gradients": ranks.gradient_shards(model),
        "calls": dict(calls),
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
    }


def _count_first_layers(model: Qwen3VLModel) -> Counter[str]:
    """In training; the check before the first step runs a stage in evaluation mode."""
    calls: Counter[str] = Counter()
    parts = {"language": model.language_model} | ({"vision": model.vision_model} if model.pre_process else {})
    for name, part in parts.items():
        part.decoder.layers[0].register_forward_hook(lambda layer, *_, name=name: calls.update([name] * layer.training))
    return calls


def _with_axis(pack: Pack) -> dict[str, torch.Tensor]:
    return {key: value[None] for key, value in pack.items()}
