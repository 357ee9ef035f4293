"""The tasks of an export: one for each group of tensors that are never apart (q, k, v; gate and up; an expert's)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.live.collectives import gather, raise_on_all_ranks
from megatron_vlbridge.checkpoint.live.export import fused_groups
from megatron_vlbridge.checkpoint.live.shards import Model, modules_of, shards_of
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, RuleTable


@dataclass(frozen=True)
class TaskMapping:
    """What a task maps: `hf_param` is the name of its tensor, or of several the names by themselves.

    `tp_size` and `ep_size` are what the elements of the task's `param_weight` are to be multiplied by: 1. A group is
    never split over tasks, so there is no `group_key`.
    """

    hf_param: str | Mapping[str, str]
    is_expert: bool
    tp_size: int = 1
    ep_size: int = 1
    is_grouped_export: bool = False
    group_key: str | None = None


@dataclass(frozen=True)
class ConversionTask:
    """A part of an export. `param_name` is Megatron's, with the number of the layer in the whole model.

    `param_weight` has the dtype and the number of elements of the whole Hugging Face tensors, on the meta device; on
    all ranks of the one pipeline stage that exports them (`pp_rank`), None on the others.
    """

    param_name: str
    global_param_name: str
    mapping: TaskMapping
    pp_rank: int
    param_weight: torch.Tensor | None
    names: tuple[str, ...] = field(repr=False)
    planned: torch.Tensor | None = field(repr=False)


def conversion_tasks(model: Model) -> list[ConversionTask]:
    """The tasks of a model, in the order of its export and the same on all ranks but for `param_weight`.

    All ranks must call it. Raises VLBridgeError, on all ranks, where the model does not match its config.
    """
    config = modules_of(model)[0].hf_config
    table = families.find(config).table_for(config)
    groups = fused_groups(table)
    index_of = {name: index for index, names in enumerate(groups) for name in names}
    held: dict[int, torch.dtype] = {}
    with raise_on_all_ranks():
        for module in modules_of(model):
            for shard in shards_of(module, table, "the live model"):
                for piece in table.hf_sources(shard.known) if shard.known is not None else ():
                    held.setdefault(index_of[piece.source.name], shard.values.dtype)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    owners: dict[int, tuple[int, torch.dtype]] = {}
    for rank_stage, theirs in sorted(gather((stage, held)), key=lambda item: item[0]):
        for index, dtype in theirs.items():
            owners.setdefault(index, (rank_stage, dtype))
    if missing := [names[0] for index, names in enumerate(groups) if index not in owners]:
        raise VLBridgeError(
            f"get_conversion_tasks: expected every weight on one of the ranks, found {missing[0]} on none. Give the "
            "list of all chunks, on every rank."
        )
    return [_task(table, names, *owners[index], stage) for index, names in enumerate(groups)]


def names_of(tasks: Iterable[object]) -> list[str]:
    """The tensors of tasks; None stands for no task.

    Raises VLBridgeError for tasks that `get_conversion_tasks` did not make, or whose weight was replaced.
    """
    names: list[str] = []
    for task in tasks:
        if task is None:
            continue
        if not isinstance(task, ConversionTask):
            raise VLBridgeError(
                f"conversion_tasks: expected tasks of get_conversion_tasks, found {type(task).__name__}. Use its."
            )
        if task.param_weight is not task.planned:
            raise VLBridgeError(
                f"conversion_tasks: {task.param_name}: expected its param_weight as get_conversion_tasks made it, "
                "found another tensor. The values exported are those of the model: copy the tensor into it first."
            )
        names += task.names
    return names


def _task(table: RuleTable, names: Sequence[str], owner: int, dtype: torch.dtype, stage: int) -> ConversionTask:
    source = table.megatron_sources(Region.whole(names[0], table.hf_shapes[names[0]]))[0].source
    name = _megatron_name(source)
    weight = None
    if owner == stage:
        size = sum(math.prod(table.hf_shapes[name]) for name in names)
        weight = torch.empty(size, dtype=dtype, device="meta")
    hf_param = names[0] if len(names) == 1 else {name: name for name in names}
    mapping = TaskMapping(hf_param, is_expert=".experts." in name)
    return ConversionTask(name, name, mapping, owner, weight, tuple(names), weight)


def _megatron_name(source: Region) -> str:
    """The name of the parameter that holds a region, with the number of its layer."""
    head, layers, rest = source.name.partition(".layers.")
    stacked = layers and not rest.partition(".")[0].isdecimal()
    return f"{head}{layers}{source.offset[0]}.{rest}" if stacked else source.name
