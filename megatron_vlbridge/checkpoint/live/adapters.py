"""The adapters of a live, sharded model as folders of `peft`, and back."""

import math
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_vlbridge.checkpoint.live.collectives import in_step, raise_on_all_ranks, rank_and_size
from megatron_vlbridge.checkpoint.live.shards import Model, Shard, modules_of
from megatron_vlbridge.checkpoint.live.weights import LiveWeights
from megatron_vlbridge.checkpoint.peft.adapter import LoraPair, base_shapes, read_adapter
from megatron_vlbridge.checkpoint.peft.config import AdapterConfig
from megatron_vlbridge.checkpoint.peft.writer import peft_tensors, write_adapter
from megatron_vlbridge.checkpoint.stream.raw import check_fits
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, RuleTable
from megatron_vlbridge.weights.adapters import HALVES, adapter_table, adapter_tensor, weight_of
from megatron_vlbridge.weights.regions import Shape

_SOURCE = "the adapters of the live model"
_AT_ONCE = 64  # weights whose pairs travel together
_SHOWN = 3


def export_adapter_weights(
    model: Model, *, ranks: Literal["all", "first"] = "all"
) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapters of a live, sharded model as `peft` has them: `(name, tensor)`, on the device of the parameters.

    A is `[r, in]` and B `[out, r]` (of experts: `checkpoint.peft.writer.peft_tensors`), named such as
    `base_model.model.lm_head.lora_A.weight`, in the order of the checkpoint on every rank. All ranks must call it and
    iterate to the end; `ranks` says who receives. The weights beside them: `export_hf_weights`.

    Raises VLBridgeError, on all ranks: the model has no adapters, or the ranks do not hold each of them once.
    Example: `dict(export_adapter_weights(model))`.
    """
    for weight, (a, b) in export_pairs(model, ranks=ranks):
        yield from peft_tensors(weight, a, b, _settings(model).weights).items()


@torch.no_grad()
def export_pairs(
    model: Model, *, ranks: Literal["all", "first"] = "all"
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """By the names of their weights A `[r, in]` and B `[out, r]`, of experts with a leading axis."""
    with raise_on_all_ranks():
        settings, shapes = _settings(model), _shapes(model)
        table = adapter_table(shapes, settings.weights, settings.rank)
    live = LiveWeights(model, table, None, {"adapters of": settings, "ranks": ranks}, _shards)
    receiver = None if ranks == "all" else 0
    for weights, alone in in_step(list(batched(settings.weights, _AT_ONCE)), "export of adapters"):
        names = {weight: [adapter_tensor(weight, half) for half in HALVES] for weight in weights}
        live.fetch((Region.whole(x, table.hf_shapes[x]) for both in names.values() for x in both), receiver)
        with alone:
            mine = names if receiver in (None, live.rank) else {}
            pairs = {weight: _pair(live, table, both) for weight, both in mine.items()}
            live.release()
            yield from pairs.items()


def save_adapter(model: Model, folder: str | Path, base_model: str) -> Path:
    """Write the adapters of a live, sharded model as a folder that `peft` loads; gives the folder.

    `base_model` is the folder or Hub id of the checkpoint that they were trained on. All ranks must call it; the first
    one writes, and holds all adapters meanwhile. The folder appears under its name when it is complete.

    Raises VLBridgeError, on all ranks: as `export_adapter_weights`; or the folder is taken or cannot be written.
    Example: `save_adapter(model, "adapter", "Qwen/Qwen3-VL-2B-Instruct")`.
    """
    pairs = {name: (a.cpu(), b.cpu()) for name, (a, b) in export_pairs(model, ranks="first")}
    settings = _settings(model)
    with raise_on_all_ranks():
        if rank_and_size()[0] == 0:
            write_adapter(Path(folder), base_model, AdapterConfig(settings.rank, settings.alpha), pairs)
    return Path(folder)


@torch.no_grad()
def load_adapter(model: Model, folder: str | Path) -> None:
    """Copy a folder of `peft` into the adapters of a live, sharded model, in place.

    The model has adapters for the same weights, of the same rank and scaling (`add_lora`). Each rank keeps its part, in
    the dtype of the model. All ranks must call it.

    Raises VLBridgeError, on all ranks: the folder's adapter is of another base, rank or scaling, for other weights, of
    a kind that is not supported, damaged, or has values that the model's dtype cannot hold; the model has no adapters.
    After an error in the values some adapters may be filled.
    Example: `add_lora(model, rank=8, alpha=16, targets=["q_proj"])`, then `load_adapter(model, "adapter")`.
    """
    folder = Path(folder)
    with raise_on_all_ranks():
        settings = _settings(model)
        pairs = read_adapter(folder, _shapes(model))
        _check_same(folder, settings, pairs)
        for module in modules_of(model):
            for shard in module.adapter_shards():
                _fill(shard, pairs[weight_of(shard.region.name)])


def _settings(model: Model) -> Any:
    """What `add_lora` noted, the same in all chunks."""
    found = [getattr(module, "lora", None) for module in modules_of(model)]
    if found[0] is None or found.count(found[0]) != len(found):
        raise VLBridgeError(
            f"{_SOURCE}: expected the same adapters in all of its {len(found)} chunks, found "
            f"{'none in the first' if found[0] is None else 'others'}. Call add_lora on each chunk."
        )
    return found[0]


def _shapes(model: Model) -> dict[str, Shape]:
    """The weights of the base that can have an adapter."""
    return base_shapes(modules_of(model)[0].hf_config)


def _shards(module: Any, _table: RuleTable, _source: str) -> list[Shard]:
    return [Shard(x.region, x.region, x.values, not any(x.replica_id)) for x in module.adapter_shards()]


def _pair(live: LiveWeights, table: RuleTable, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, whole and new."""
    a, b = (torch.empty(table.hf_shapes[x], dtype=live.table[x].dtype, device=live.device) for x in names)
    for name, out in zip(names, (a, b), strict=True):
        live.read_into(Region.whole(name, table.hf_shapes[name]), out)
    return a, b


def _check_same(folder: Path, settings: Any, pairs: dict[str, LoraPair]) -> None:
    differing = sorted(pairs.keys() ^ set(settings.weights))
    if differing:
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise VLBridgeError(
            f"{folder}: expected adapters of the {len(settings.weights)} weights that have one in the model, found "
            f"{len(pairs)}; {', '.join(differing[:_SHOWN])}{more} have one in only one of both. Give add_lora the "
            "targets that the folder was made with."
        )
    for weight, pair in pairs.items():
        rank, alpha = pair.a.spec.shape[-2], pair.a.spec.shape[-2] * pair.scaling
        # alpha / sqrt(rank) may differ from alpha / rank of another alpha by its rounding.
        if rank != settings.rank or not math.isclose(pair.scaling, settings.scaling, rel_tol=1e-12):
            several = any(one.a.spec.shape[-2] != rank or one.scaling != pair.scaling for one in pairs.values())
            remedy = "Merge the folder into its base"
            if alpha > 0 and not several:
                remedy = f"Give add_lora rank={rank}, alpha={alpha!r}"
            raise VLBridgeError(
                f"{folder}: {weight}: expected rank {settings.rank} and scaling {settings.scaling:g}, those of the "
                f"model, found {rank} and {pair.scaling:g}. {remedy}."
            )


def _fill(shard: Any, pair: LoraPair) -> None:
    expert = None if pair.experts is None else shard.region.offset[0]
    values = pair.read(expert)[HALVES.index(shard.region.name[-1])]
    check_fits(weight_of(shard.region.name), values, shard.values.dtype)
    shard.values.copy_(values[shard.region.slices[-2:]].reshape(shard.values.shape))
