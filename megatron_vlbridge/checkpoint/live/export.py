"""Full Hugging Face tensors out of a live, sharded model, a bucket at a time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import batched, chain
from typing import Literal

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.dtypes import as_dtype
from megatron_vlbridge.checkpoint.live.shards import Model, modules_of
from megatron_vlbridge.checkpoint.live.weights import LiveWeights
from megatron_vlbridge.checkpoint.stream.parts import group
from megatron_vlbridge.checkpoint.stream.raw import gather_into
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Piece, Region, RuleTable, SingleExperts, TensorSpec

BUCKET_BYTES = 512 * 2**20
RECEIVERS = ("all", "first", "shared")


def export_hf_weights(
    model: Model,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    ranks: Literal["all", "first", "shared"] = "all",
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a live, sharded model as Hugging Face has them: `(name, tensor)` one by one, whole and new.

    `model` is what Megatron's `get_model` gives, as for `load_hf_weights`. All ranks must call it with the same
    arguments and iterate to the end; meanwhile the model must not change. `ranks` says who receives: `"all"`, the
    `"first"` alone, or each a `"shared"` part, every tensor on one rank; where a rank does not receive, its iterator
    sends what the rank holds and yields nothing. Names and their order depend on the architecture alone, not on the
    layout. Tensors are on the device of the parameters, in their dtype or in `dtype`; experts have the form `experts`
    (an `ExpertForm`, default: the Hub's). Rows that pad the vocabulary are cut, a tied head is not repeated. `names`
    are the tensors to export, of those that belong together all or none (default: all tensors).

    Tensors travel in buckets of at most `bucket_bytes`. Those that belong together (q, k, v of a layer; gate and up; an
    expert's) are never split, and larger ones are buckets of their own. Beside the model, and what the consumer keeps,
    a rank holds two buckets at the most. A bucket is sent when its first tensor is asked for: ranks that stop earlier
    than others leave these waiting, unless `ranks` is `"all"` and every rank stops after the same tensor.

    Raises VLBridgeError, on all ranks and before the first tensor, where an argument is invalid or differs between the
    ranks, the ranks do not hold every weight exactly once, or a value is too large for `dtype`.
    Example: `for name, tensor in export_hf_weights(model): engine.load_weights([(name, tensor)])`.
    """
    if bucket_bytes < 1:
        raise VLBridgeError(f"bucket_bytes: expected at least 1, found {bucket_bytes}.")
    if ranks not in RECEIVERS:
        raise VLBridgeError(f"ranks: expected one of {', '.join(RECEIVERS)}, found {ranks!r}.")
    config: Config = modules_of(model)[0].hf_config
    rules = families.find(config).table_for(config, None, experts)
    options = {"bucket_bytes": bucket_bytes, "ranks": ranks, "dtype": str(dtype), "experts": experts}
    chosen = None if names is None else set(names)
    with torch.no_grad():
        weights = LiveWeights(
            model, rules, as_dtype(dtype), options | {"names": None if chosen is None else sorted(chosen)}
        )
    return _stream(weights, rules, _chosen_groups(rules, chosen), bucket_bytes, ranks)


def fused_groups(rules: RuleTable) -> list[list[str]]:
    """All HF tensors in the order of the rules; together those of one rule, of single experts those of one."""
    seen: set[str] = set()
    groups: list[list[str]] = []
    for rule in rules.rules:
        names = [name for name in dict.fromkeys(move.hf.name for move in rule.moves()) if name not in seen]
        seen.update(names)
        if names:
            size = len(rule.hf) if isinstance(rule, SingleExperts) else len(names)
            groups += map(list, batched(names, size))
    return groups


def fill_buckets(groups: Sequence[Sequence[str]], specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    """Neighbouring groups together, up to `limit` bytes in a bucket unless one group is larger."""
    buckets = group(groups, lambda names: sum(specs[name].nbytes for name in names), limit)
    return [list(chain(*bucket)) for bucket in buckets]


def _chosen_groups(rules: RuleTable, names: Collection[str] | None) -> list[list[str]]:
    groups = fused_groups(rules)
    if names is None:
        return groups
    chosen = [group for group in groups if set(names).issuperset(group)]
    if rest := set(names).difference(*chosen):
        raise VLBridgeError(
            f"names: expected tensors of the model, and of those that belong together all, found {min(rest)}. Give "
            "whole groups: q, k and v; gate and up; those of an expert."
        )
    return chosen


@torch.no_grad()
def _stream(
    weights: LiveWeights, rules: RuleTable, groups: Sequence[Sequence[str]], limit: int, ranks: str
) -> Iterator[tuple[str, torch.Tensor]]:
    pieces = {name: rules.megatron_sources(Region.whole(name, shape)) for name, shape in rules.hf_shapes.items()}
    specs = {
        name: TensorSpec(shape, weights.table[pieces[name][0].source.name].dtype)
        for name, shape in rules.hf_shapes.items()
    }
    buckets = fill_buckets(groups, specs, limit)
    # A shared round gives every rank one bucket, so that all have something to work on when it ends.
    for round_ in batched(buckets, weights.size if ranks == "shared" else 1):
        mine: list[str] = []
        for index, bucket in enumerate(round_):
            receiver = None if ranks == "all" else index
            weights.fetch((piece.source for name in bucket for piece in pieces[name]), receiver)
            if receiver in (None, weights.rank):
                mine = bucket
        tensors = [_assemble(specs[name], pieces[name], weights) for name in mine]
        weights.release()
        for name in mine:
            yield name, tensors.pop(0)


def _assemble(spec: TensorSpec, pieces: Sequence[Piece], weights: LiveWeights) -> torch.Tensor:
    out = torch.empty(spec.shape, dtype=spec.dtype, device=weights.device)
    gather_into(out, pieces, weights.read_into, weights.table)
    return out
