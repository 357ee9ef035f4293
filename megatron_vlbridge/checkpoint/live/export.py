"""Full Hugging Face tensors out of a live, sharded model, a bucket at a time."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched, chain
from typing import Literal

import torch

from megatron_vlbridge.checkpoint.dtypes import as_dtype
from megatron_vlbridge.checkpoint.hf.fp8 import SCALE
from megatron_vlbridge.checkpoint.hf.quantise import check_quantisable, quantise, quantised_specs
from megatron_vlbridge.checkpoint.live.collectives import in_step, raise_on_all_ranks
from megatron_vlbridge.checkpoint.live.delta import WeightDigests
from megatron_vlbridge.checkpoint.live.shards import Model, modules_of
from megatron_vlbridge.checkpoint.live.specs import export_rules
from megatron_vlbridge.checkpoint.live.weights import LiveWeights
from megatron_vlbridge.checkpoint.stream.parts import group
from megatron_vlbridge.checkpoint.stream.raw import gather_into
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.fp8 import is_quantised
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
    fp8: bool = False,
    digests: WeightDigests | None = None,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a live, sharded model as Hugging Face has them: `(name, tensor)` one by one, whole and new.

    `model` is what Megatron's `get_model` gives, as for `load_hf_weights`. All ranks must call it with the same
    arguments and iterate to the end; meanwhile the model must not change. `ranks` says who receives: `"all"`, the
    `"first"` alone, or each a `"shared"` part, every tensor on one rank; where a rank does not receive, its iterator
    sends what the rank holds and yields nothing. Names and their order depend on the architecture alone, not on the
    layout; `hf_weight_specs` gives them without a model. Tensors are on the device of the parameters, in their dtype
    or in `dtype`; experts have the form `experts` (an `ExpertForm`, default `"hub"`, the Hub's, which vLLM and sglang
    load). Rows that pad the vocabulary are cut, a tied head is not repeated. `names` are the tensors to export, of
    those that belong together all or none (default: all tensors).

    With `fp8` the linear layers of decoder and MTP layers are float8_e4m3fn, each followed by its float32 scales
    `x.weight_scale_inv`, one for each block of 128 x 128 of the whole matrix; experts are single then.

    With `digests`, those that are unchanged since the last export with the same `WeightDigests` are left out, q without
    k and v too; they are named in its `unchanged`.

    Tensors travel in buckets of at most `bucket_bytes`, before they are quantised. Those that belong together (q, k, v
    of a layer; gate and up; an expert's) are never split, and larger ones are buckets of their own. Beside the model,
    and what the consumer keeps, a rank holds two buckets at the most. A bucket is sent when its first tensor is asked
    for. Where a rank stops earlier than others, these raise when they ask for the next bucket.

    Raises VLBridgeError, on all ranks and before the first tensor, where an argument is invalid or differs between the
    ranks, the ranks do not hold every weight exactly once, or a value is too large for `dtype`, or has no form in FP8.
    Example: `for name, tensor in export_hf_weights(model): engine.load_weights([(name, tensor)])`.
    """
    with raise_on_all_ranks():
        if bucket_bytes < 1:
            raise VLBridgeError(f"bucket_bytes: expected at least 1, found {bucket_bytes}.")
        if ranks not in RECEIVERS:
            raise VLBridgeError(f"ranks: expected one of {', '.join(RECEIVERS)}, found {ranks!r}.")
        wanted, rules = as_dtype(dtype), export_rules(modules_of(model)[0].hf_config, experts, fp8)
        groups = _chosen_groups(rules, names)
        if names is not None and digests is not None:
            raise VLBridgeError("names: expected all tensors beside digests, found some. Leave out one of the two.")
    options = {"bucket_bytes": bucket_bytes, "ranks": ranks, "dtype": str(dtype), "experts": experts, "fp8": fp8}
    with torch.no_grad():
        more = {"digests": digests is not None, "names": None if names is None else groups}
        weights = LiveWeights(model, rules, wanted, options | more)
        if fp8:
            _check_quantisable(weights, rules)
        chosen = chain(*groups) if digests is None else digests.compare(weights, rules, options)
    return _stream(_Export(weights, rules, bucket_bytes, ranks, fp8, list(chosen), digests))


@dataclass(frozen=True)
class _Export:
    """One call of `export_hf_weights`, of the tensors with these `names`."""

    weights: LiveWeights
    rules: RuleTable
    bucket_bytes: int
    ranks: str
    fp8: bool
    names: Collection[str]
    digests: WeightDigests | None


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
    wanted = set(names)
    chosen = [together for together in groups if wanted.issuperset(together)]
    if rest := wanted.difference(*chosen):
        raise VLBridgeError(
            f"names: expected tensors of the model, and of those that belong together all, found {min(rest)}. Give "
            "whole groups: q, k and v; gate and up; those of an expert."
        )
    return chosen


def _check_quantisable(weights: LiveWeights, rules: RuleTable) -> None:
    """Raise on all ranks, before the first tensor, what `quantise` would raise on some in the midst of others."""
    quantised_specs(_specs(weights, rules))
    quantised = {move.megatron.name for move in rules.moves if is_quantised(move.hf.name)}

    def check(region: Region, values: torch.Tensor) -> None:
        if region.name in quantised:
            check_quantisable(str(region), values)

    weights.visit(check)


def _specs(weights: LiveWeights, rules: RuleTable) -> dict[str, TensorSpec]:
    """The tensors in the dtypes of the parameters that they come from."""
    dtypes = {move.hf.name: weights.table[move.megatron.name].dtype for move in rules.moves}
    return {name: TensorSpec(shape, dtypes[name]) for name, shape in rules.hf_shapes.items()}


@torch.no_grad()
def _stream(export: _Export) -> Iterator[tuple[str, torch.Tensor]]:
    weights, rules = export.weights, export.rules
    specs = _specs(weights, rules)
    pieces = {name: rules.megatron_sources(Region.whole(name, specs[name].shape)) for name in export.names}
    groups = [[name for name in names if name in pieces] for names in fused_groups(rules)]
    buckets = fill_buckets(groups, specs, export.bucket_bytes)
    # A shared round gives every rank one bucket, so that all have something to work on when it ends.
    rounds = list(batched(buckets, weights.size if export.ranks == "shared" else 1))
    for round_, alone in in_step(rounds, "export of weights"):
        mine: list[str] = []
        for index, bucket in enumerate(round_):
            receiver = None if export.ranks == "all" else index
            weights.fetch((piece.source for name in bucket for piece in pieces[name]), receiver)
            if receiver in (None, weights.rank):
                mine = bucket
        with alone:
            whole = ((name, _assemble(specs[name], pieces[name], weights)) for name in mine)
            tensors = [pair for name, x in whole for pair in _quantised(name, x, export.fp8)]
            weights.release()
            while tensors:
                yield tensors.pop(0)
    if export.digests is not None:
        export.digests.complete()


def _assemble(spec: TensorSpec, pieces: Sequence[Piece], weights: LiveWeights) -> torch.Tensor:
    out = torch.empty(spec.shape, dtype=spec.dtype, device=weights.device)
    gather_into(out, pieces, weights.read_into, weights.table)
    return out


def _quantised(name: str, whole: torch.Tensor, fp8: bool) -> Iterable[tuple[str, torch.Tensor]]:
    """A tensor as it is exported: alone, or its values and scales."""
    if fp8 and is_quantised(name):
        return zip((name, name + SCALE), quantise(name, whole), strict=True)
    return [(name, whole)]
