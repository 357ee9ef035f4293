"""Adapters for the linear layers of a model: which rows and columns of which Hugging Face weights each has."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.lora.adapter import Adapter, GroupedAdapter, Part, Placement, Run, add_output
from megatron_vlbridge.model.lora.targets import lora_table, select_weights
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.weights import Region, RuleTable


@dataclass(frozen=True)
class LoraSettings:
    """The adapters of a model; `weights` are the names of the Hugging Face weights that have one."""

    rank: int
    alpha: float
    dropout: float
    weights: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / self.rank


def add_lora(
    model: Qwen3VLModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    vision: bool = False,
    seed: int = 0,
) -> None:
    """Freeze a stage of the model, which must not be wrapped by Megatron's DDP yet, and add adapters to it.

    `targets` and `vision` are those of `lora.targets.select_weights`. The output of a projection becomes
    `W x + alpha / rank * B A dropout(x)`, with A random (`seed`; the same in every layout) and B zero. Projections that
    Megatron has in one layer, such as q, k and v, share the dropout. From now on `sharded_state_dict` has the adapters
    alone; `load_hf_weights` and `export_hf_weights` move the weights that they are added to.

    Raises VLBridgeError, the same on all ranks: an invalid rank, alpha or dropout, a target of `select_weights` that is
    invalid, dropout in experts (which `peft` does not have either), a model with adapters.
    Example: `add_lora(model, rank=16, alpha=32, targets=["q_proj", "v_proj"])`, in a `model_provider`.
    """
    settings = lora_settings(model.hf_config, rank=rank, alpha=alpha, dropout=dropout, targets=targets, vision=vision)
    if model.lora is not None:
        raise VLBridgeError("add_lora: expected a model without adapters, found one that has some. Call it once.")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lora = settings
    for name, layers in _layers(model, lora_table(model.hf_config), set(settings.weights)).items():
        _attach(model, name, layers, settings, seed)


def lora_settings(
    hf_config: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    vision: bool = False,
) -> LoraSettings:
    """What `add_lora` would add, after its checks."""
    if type(rank) is not int or rank < 1:
        raise VLBridgeError(f"LoRA rank: expected an integer of at least 1, found {rank}.")
    if not 0 < alpha < math.inf:
        raise VLBridgeError(f"LoRA alpha: expected a positive number, found {alpha}.")
    if not 0 <= dropout < 1:
        raise VLBridgeError(f"LoRA dropout: expected 0 to below 1, found {dropout}.")
    weights = select_weights(hf_config, targets, vision)
    experts = [name for name in weights if not name.endswith(".weight")]
    if dropout and experts:
        raise VLBridgeError(
            f"LoRA dropout {dropout}: expected 0 with adapters of experts, found {experts[0]} among the targets; peft "
            "has none there either. Leave out the dropout, or name other targets."
        )
    return LoraSettings(rank, float(alpha), dropout, tuple(weights))


@dataclass(frozen=True)
class _Layer:
    """A weight of a linear layer: the parts of the Hugging Face weights in it, and `order` of :class:`Adapter`."""

    weight: torch.nn.Parameter
    parts: list[Part]
    order: torch.Tensor
    expert: bool


def _layers(model: Qwen3VLModel, table: RuleTable, wanted: set[str]) -> dict[str, list[_Layer]]:
    """By the name of a linear layer its weights (several where it holds several experts) that get adapters."""
    found: dict[str, list[_Layer]] = {}
    parameters = dict(model.named_parameters())
    for name, entry in model.base_sharded_state_dict().items():
        if name in parameters and parameters[name].dim() == 2:
            layer = _layer(parameters[name], list(_tensors(entry)), table, wanted)
            if layer is not None:
                found.setdefault(name.rpartition(".")[0], []).append(layer)
    return found


def _tensors(entry: Any) -> Iterator[ShardedTensor]:
    """The shards of a parameter; a factory cuts one into several, such as gate and up."""
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    if isinstance(built, ShardedTensor):
        yield built
    elif isinstance(built, Mapping):
        yield from built.values()
    elif isinstance(built, Sequence):
        yield from built


def _layer(
    weight: torch.nn.Parameter, shards: Sequence[ShardedTensor], table: RuleTable, wanted: set[str]
) -> _Layer | None:
    owners: dict[str, list[tuple[int, int, int]]] = {}  # HF weight -> (row here, row there, count)
    sources: dict[str, Region] = {}
    for shard in shards:
        region = table.canonical(
            Region(shard.key, tuple(shard.global_offset), (1,) * shard.prepend_axis_num + tuple(shard.local_shape))
        )
        # Also of other ranks' rows: all ranks must have the same A.
        for piece in table.megatron.pieces(_all_rows(region, table)):
            if piece.source.name in wanted:
                owners.setdefault(piece.source.name, [])
                sources.setdefault(piece.source.name, piece.source)
        assert shard.data is not None
        start = (shard.data.data_ptr() - weight.data_ptr()) // (weight.element_size() * weight.shape[1])
        for piece in table.megatron.pieces(region):
            if piece.source.name in wanted:
                rows = start + piece.target.offset[-2], piece.source.offset[-2], piece.source.shape[-2]
                owners[piece.source.name].append(rows)
                sources[piece.source.name] = piece.source
    if not owners:
        return None
    columns = shards[0].global_offset[-1], weight.shape[1]
    parts, order = _parts(weight.shape[0], owners, sources, table, columns)
    return _Layer(weight, parts, order, ".experts." in shards[0].key)


def _all_rows(region: Region, table: RuleTable) -> Region:
    """The whole rows of the layer and expert that a region is of."""
    shape, lead = table.megatron_shapes[region.name], len(region.shape) - 2
    return Region(region.name, (*region.offset[:lead], 0, 0), (*region.shape[:lead], *shape[-2:]))


def _parts(
    size: int,
    owners: Mapping[str, Sequence[tuple[int, int, int]]],
    sources: Mapping[str, Region],
    table: RuleTable,
    columns: Run,
) -> tuple[list[Part], torch.Tensor]:
    """The parts, each with its rows in the order of the Hugging Face weight, and where each output finds its row."""
    total = sum(count for runs in owners.values() for _, _, count in runs)
    parts, order, start = [], torch.full((size,), total), 0
    for name, runs in owners.items():
        merged: list[Run] = []
        for here, first, count in sorted(runs, key=lambda run: run[1]):
            order[here : here + count] = torch.arange(start, start + count)
            start += count
            if merged and sum(merged[-1]) == first:
                merged[-1] = merged[-1][0], merged[-1][1] + count
            else:
                merged.append((first, count))
        shape = table.hf_shapes[name]
        expert = sources[name].offset[0] if len(shape) == 3 else None
        experts = shape[0] if len(shape) == 3 else None
        parts.append(Part(name, (shape[-2], shape[-1]), tuple(merged), columns, expert, experts))
    return parts, order


def _attach(model: Qwen3VLModel, name: str, layers: Sequence[_Layer], settings: LoraSettings, seed: int) -> None:
    owner_name, _, own_name = name.rpartition(".")
    owner, layer = model.get_submodule(owner_name), model.get_submodule(name)
    numbers = settings.rank, settings.scaling, settings.dropout
    adapters = [Adapter(x.parts, x.order, _placement(model, x), x.weight, *numbers) for x in layers]
    for adapter in adapters:
        _initialize(adapter, seed)
    added = adapters[0] if hasattr(layer, "weight") else GroupedAdapter(adapters)
    owner.add_module(f"{own_name}_lora", added)
    layer.register_forward_hook(partial(add_output, added))


def _placement(model: Qwen3VLModel, layer: _Layer) -> Placement:
    groups = model.pg_collection
    row = getattr(layer.weight, "partition_dim", 0) == 1
    if layer.expert:
        return Placement(row, True, False, groups.expt_tp, groups.expt_dp)
    return Placement(row, False, bool(model.config.sequence_parallel), groups.tp, groups.dp_cp)


@torch.no_grad()
def _initialize(adapter: Adapter, seed: int) -> None:
    """A as `peft` draws it, uniform within `1 / sqrt(in)`: the whole matrix, of which the rank keeps its part."""
    for part in adapter.parts:
        name = f"{seed} {part.weight} {part.expert}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
        bound = 1 / math.sqrt(part.shape[1])
        whole = torch.empty(adapter.rank, part.shape[1]).uniform_(-bound, bound, generator=generator)
        parameter = adapter.matrix(part, "A")
        assert parameter is not None
        parameter.copy_(whole[:, part.columns[0] : sum(part.columns)])
