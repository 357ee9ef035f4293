"""Filling a live, sharded Megatron model from a Hugging Face folder: each rank reads its own slices."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.convert import check_tied_head
from megatron_vlbridge.checkpoint.hub import find_folder
from megatron_vlbridge.checkpoint.raw import Filler, gather_into
from megatron_vlbridge.checkpoint.safetensors import SafetensorsFolder
from megatron_vlbridge.config import Config, read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Piece, Plan, Region, RuleTable, TensorSpec

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor


@torch.no_grad()
def load_hf_weights(
    model: torch.nn.Module | Sequence[torch.nn.Module], folder: str | Path, *, experts: str | None = None
) -> None:
    """Copy the weights of a Hugging Face folder (or Hub id) into a model that is already sharded, in place.

    `model` is what Megatron's `get_model` gives: one module, or a list of them under virtual pipelining, wrapped or
    not. Its own `sharded_state_dict` says which slice of which tensor each rank holds; only those are read, and
    converted to the dtype of the parameter. Rows that pad the vocabulary become zero. All ranks must call it.
    `experts` (an `ExpertForm`) says how the folder holds its experts where its tensors do not tell.

    Raises VLBridgeError when the folder does not fit its config or the model's config, a slice has no source, a
    parameter is not filled, or a weight of the folder has no place on any rank.

    Example: `load_hf_weights(get_model(model_provider), "Qwen3-VL-2B-Instruct")`.
    """
    folder = find_folder(folder)
    modules = [_unwrap(module) for module in (model if isinstance(model, Sequence) else [model])]
    config = read_config(folder)
    table, read = _prove(folder, config, experts)
    placed: set[str] = set()
    for module in modules:
        _check_config(folder, config, module)
        tensors = list(_sharded_tensors(module.sharded_state_dict()))
        _check_every_parameter_is_filled(module, tensors)
        for tensor in tensors:
            placed.add(_fill(folder, tensor, table, read))
    _check_every_weight_is_placed(folder, table, placed)


def _prove(folder: Path, config: Config, experts: str | None) -> tuple[RuleTable, Filler]:
    """The rules of the folder, proved against its headers, and how to read it."""
    family = families.find(config)
    weights = SafetensorsFolder(folder)
    hf = dict(weights.table)
    table = family.table(config, family.find_expert_form(config, hf, experts))
    if config.tie_word_embeddings and family.head in hf:
        check_tied_head(weights, family)
        del hf[family.head]
    megatron = {name: TensorSpec(shape, torch.float32) for name, shape in table.megatron_shapes.items()}
    Plan(table, hf, megatron, cast=True, hf_source=str(folder), megatron_source="the model")
    return table, weights.read_into


def _unwrap(module: torch.nn.Module) -> Any:
    """The model inside DistributedDataParallel, Float16Module and the like, which all call it `module`."""
    inner = getattr(module, "module", None)
    return _unwrap(inner) if isinstance(inner, torch.nn.Module) else module


def _check_config(folder: Path, config: Config, module: Any) -> None:
    built: Config = module.checkpoint
    for part in ("architecture", "text", "vision", "tie_word_embeddings"):
        expected, found = getattr(built, part), getattr(config, part)
        if expected != found:
            raise VLBridgeError(
                f"{folder}: {part}: expected {expected}, as the model was built, found {found}. "
                "Build the model from this folder's config."
            )


def _sharded_tensors(value: object) -> Iterator[ShardedTensor]:
    """Every tensor shard in a sharded state dict; factories, such as that of gate and up, are asked for theirs."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, ShardedTensorFactory):
        yield from _sharded_tensors(value.build())
    elif isinstance(value, dict):
        for item in value.values():
            yield from _sharded_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sharded_tensors(item)


def _check_every_parameter_is_filled(module: torch.nn.Module, tensors: Iterable[ShardedTensor]) -> None:
    """Each parameter's memory must be that of its shards, or the copy would go elsewhere."""
    shards = {tensor.data.data_ptr(): tensor.data.numel() for tensor in tensors if tensor.data is not None}
    places = sorted(shards)
    for name, parameter in module.named_parameters():
        start = parameter.data_ptr()
        inside = places[bisect_left(places, start) : bisect_left(places, start + parameter.nbytes)]
        found = sum(shards[place] for place in inside)
        if found != parameter.numel():
            raise VLBridgeError(
                f"{name}: expected all {parameter.numel()} numbers in the model's sharded_state_dict, found {found}. "
                "The module must describe each parameter there, in its own memory."
            )


def _fill(folder: Path, tensor: ShardedTensor, table: RuleTable, read: Filler) -> str:
    """Copy one shard's numbers into it, and return its canonical name."""
    surplus = tensor.prepend_axis_num
    region = Region(tensor.key, tuple(tensor.global_offset), (1,) * surplus + tuple(tensor.local_shape))
    canonical = table.canonical(region)
    expected = table.megatron_shapes.get(canonical.name)
    name = canonical.name
    if expected is None:
        raise VLBridgeError(f"{folder}: expected a source for {tensor.key}, found no rule for it in this architecture.")
    known = canonical.intersection(Region.whole(name, expected))
    padded = name in table.padded and tensor.global_shape[0] >= expected[0]
    stacked = len(canonical.shape) > len(region.shape)
    shape = tuple(tensor.global_shape) if not stacked else (expected[0], *tensor.global_shape)
    if shape != expected and not (padded and shape[1:] == expected[1:]):
        raise VLBridgeError(f"{folder}: {tensor.key}: expected {list(expected)} in the model, found {list(shape)}.")
    assert tensor.data is not None
    local = tensor.data.view(canonical.shape)
    if known is None or known.shape != canonical.shape:
        local.zero_()
    if known is not None:
        pieces: list[Piece] = table.hf_sources(known)
        gather_into(local[known.within(canonical).slices], pieces, read)
    return name


def _check_every_weight_is_placed(folder: Path, table: RuleTable, placed: set[str]) -> None:
    """Over all ranks, no weight of the folder may be left unread."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone: list[set[str] | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, placed)
        placed = set().union(*(names or set() for names in everyone))
    left = sorted(table.megatron_shapes.keys() - placed)
    if left:
        raise VLBridgeError(
            f"{folder}: expected a place in the model for every weight, found none for {len(left)}: "
            f"{', '.join(left[:8])}. Build the whole model, on all pipeline stages."
        )
