"""The adapters of a model in Megatron's checkpoints, and their values by the names and regions of whole tensors.

They are stored in the shapes of whole Hugging Face tensors, A `[rank, in]` and B `[out, rank]`, with a leading axis
for experts that share a tensor. So they do not depend on the layout, and layers need not be alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vlbridge.model.lora.adapter import Adapter, Part
from megatron_vlbridge.weights import Region
from megatron_vlbridge.weights.adapters import HALVES, adapter_shape, adapter_tensor


@dataclass(frozen=True)
class AdapterShard:
    """What a rank has of A or B of a weight: `values`, in the parameter's memory, are `region` of the whole tensor."""

    region: Region
    shape: tuple[int, ...]
    values: torch.Tensor
    replica_id: tuple[int, int, int]


def adapter_shards(model: torch.nn.Module) -> list[AdapterShard]:
    """All that this rank has of the adapters of a model."""
    return [
        shard
        for _, module, part, half in _halves(model)
        for shard in _shards(module, part, half, adapter_tensor(part.weight, half), module.matrix(part, half))
    ]


def adapter_entries(model: torch.nn.Module) -> dict[str, ShardedTensorFactory]:
    """The entries of the adapters in a sharded state dict of Megatron, by the names of their parameters."""
    entries = {}
    for name, module, part, half in _halves(model):
        parameter = module.matrix(part, half)
        assert parameter is not None
        build = partial(_build, module, part, half)
        key, replica = adapter_tensor(part.weight, half), _replica_id(module, half)
        entries[name] = ShardedTensorFactory(key, parameter, build, partial(_merge, part), replica)
    return entries


def _halves(model: torch.nn.Module) -> Iterator[tuple[str, Adapter, Part, str]]:
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            for part in module.parts:
                for half in HALVES:
                    if module.matrix(part, half) is not None:
                        yield f"{name}.{module.name_of(part, half)}", module, part, half


def _shards(module: Adapter, part: Part, half: str, name: str, values: Any) -> Iterator[AdapterShard]:
    """The regions of a parameter, or of an optimizer's state of the same shape."""
    lead: tuple[int, ...] = () if part.expert is None else (part.expert,)
    experts = () if part.experts is None else (part.experts,)
    shape = adapter_shape((*experts, *part.shape), half, module.rank)
    places = [((0, part.columns[0]), values)] if half == "A" else []
    start = 0
    for first, count in part.rows if half == "B" else ():
        places.append(((first, 0), values[start : start + count]))
        start += count
    for offset, held in places:
        held = held.detach()[(None,) * len(lead)]
        yield AdapterShard(Region(name, (*lead, *offset), tuple(held.shape)), shape, held, _replica_id(module, half))


def _replica_id(module: Adapter, half: str) -> tuple[int, int, int]:
    placement = module.placement
    whole = placement.row == (half == "B")
    return 0, placement.tp.rank() if whole else 0, placement.dp.rank()


def _build(
    module: Adapter, part: Part, half: str, key: str, values: torch.Tensor, replica_id: Any, _range: Any
) -> list[ShardedTensor]:
    # Runs of rows may differ in length, so there is no regular grid.
    return [
        ShardedTensor(
            key,
            shard.values,
            shard.values.dtype,
            tuple(shard.values.shape),
            shard.shape,
            shard.region.offset,
            None,
            replica_id,
        )
        for shard in _shards(module, part, half, key, values)
    ]


def _merge(part: Part, loaded: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x if part.expert is None else x[0] for x in loaded])
