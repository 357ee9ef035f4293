"""What the ranks of a live, sharded model hold, by its `sharded_state_dict`, and whether that is complete."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, RuleTable

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

Model = torch.nn.Module | Sequence[torch.nn.Module]

_SHOWN = 8
_ADAPTER = re.compile(r"\.adapter\.|_lora\.")


@dataclass(frozen=True)
class Shard:
    """This rank's values of a region of a canonical Megatron tensor, in the model's own memory.

    `known` is the part that the Hugging Face checkpoint has too, None where all of it pads the vocabulary. One of the
    ranks that hold the same region is the `main` one.
    """

    region: Region
    known: Region | None
    values: torch.Tensor
    main: bool

    @property
    def known_values(self) -> torch.Tensor:
        """The values of `known`."""
        assert self.known is not None
        return self.values[self.known.within(self.region).slices]


def modules_of(model: Model) -> list[Any]:
    """The chunks of a model, without DistributedDataParallel, Float16Module and the like around them."""
    return [_unwrap(module) for module in (model if isinstance(model, Sequence) else [model])]


def _unwrap(module: torch.nn.Module) -> Any:
    inner = getattr(module, "module", None)
    return _unwrap(inner) if isinstance(inner, torch.nn.Module) else module


def has_value_head(module: Any) -> bool:
    """Whether a chunk has the head of a critic in the place of the vocabulary's, which is parallel or tied."""
    weight = module.output_layer.weight if module.post_process else None
    return weight is not None and not getattr(weight, "tensor_model_parallel", False)


def shards_of(module: Any, table: RuleTable, source: str, without: tuple[str, ...] = ()) -> list[Shard]:
    """This rank's part of a module, from its `sharded_state_dict`. `source` begins the errors.

    Leaves out the tensors whose names begin with one of `without`, and adapters.

    Raises VLBridgeError for a tensor that the rules do not have, or have in another shape.
    """
    describe = getattr(module, "base_sharded_state_dict", module.sharded_state_dict)
    tensors = (x for x in sharded_tensors(describe()) if not is_adapter(x.key))
    return [_shard(x, table, source) for x in tensors if not x.key.startswith(without)]


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's: of `add_lora`, or of Megatron-Bridge and others, in a module `adapter`."""
    return _ADAPTER.search(name) is not None


def sharded_tensors(value: object) -> Iterator["ShardedTensor"]:
    """Every tensor shard in a sharded state dict, also those that factories build, such as that of gate and up."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, ShardedTensorFactory):
        yield from sharded_tensors(value.build())
    elif isinstance(value, dict):
        for item in value.values():
            yield from sharded_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from sharded_tensors(item)


def _shard(tensor: "ShardedTensor", table: RuleTable, source: str) -> Shard:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    surplus = tensor.prepend_axis_num
    region = Region(tensor.key, tuple(tensor.global_offset), (1,) * surplus + tuple(tensor.local_shape))
    canonical = table.canonical(region)
    expected = table.megatron_shapes.get(canonical.name)
    if expected is None:
        raise VLBridgeError(f"{source}: expected a source for {tensor.key}, found no rule for it in this architecture.")
    padded = canonical.name in table.padded and tensor.global_shape[0] >= expected[0]
    stacked = len(canonical.shape) > len(region.shape)
    shape = tuple(tensor.global_shape) if not stacked else (expected[0], *tensor.global_shape)
    if shape != expected and not (padded and shape[1:] == expected[1:]):
        raise VLBridgeError(f"{source}: {tensor.key}: expected {list(expected)} in the model, found {list(shape)}.")
    assert tensor.data is not None
    known = canonical.intersection(Region.whole(canonical.name, expected))
    return Shard(canonical, known, tensor.data.detach().view(canonical.shape), is_main_replica(tensor.replica_id))


def check_complete(table: RuleTable, held: Iterable[Region], source: str) -> None:
    """Reject a model with weights that are on no rank: `held` are the regions of all main shards, of all ranks."""
    by_name: dict[str, list[Region]] = {name: [] for name in table.megatron_shapes}
    for region in held:
        by_name[region.name].append(region)
    missing: list[Region] = []
    for name, regions in by_name.items():
        holes = [Region.whole(name, table.megatron_shapes[name])]
        for region in sorted(regions, key=lambda region: region.offset):
            holes = [rest for hole in holes for rest in _without(hole, region)]
        missing += holes
    if missing:
        lines = "".join(f"\n  {_describe(table, hole)}" for hole in missing[:_SHOWN])
        more = f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise VLBridgeError(
            f"{source}: expected every weight to be on some rank, found {len(missing)} on none:{lines}{more}\n"
            "Build the whole model, on all pipeline stages and expert-parallel ranks, and give all its chunks."
        )


def _without(hole: Region, region: Region) -> Iterator[Region]:
    """The rest of `hole`, cut in rectangles: what lies before and after `region` in the first dim, then the next."""
    common = hole.intersection(region)
    if common is None:
        yield hole
        return
    offset, end = list(hole.offset), list(hole.end)
    for dim, (first, last) in enumerate(zip(common.offset, common.end, strict=True)):
        for start, stop in ((offset[dim], first), (last, end[dim])):
            if start < stop:
                corner, size = [*offset], [b - a for a, b in zip(offset, end, strict=True)]
                corner[dim], size[dim] = start, stop - start
                yield Region(hole.name, tuple(corner), tuple(size))
        offset[dim], end[dim] = first, last


def _describe(table: RuleTable, hole: Region) -> str:
    names = dict.fromkeys(piece.source.name for piece in table.hf_sources(hole))
    shown = ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{hole} ({shown})"
