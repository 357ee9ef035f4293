"""A live, sharded model read as a Megatron checkpoint: values are fetched from the ranks that hold them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vlbridge.checkpoint.live.collectives import gather, raise_on_all_ranks, rank_and_size
from megatron_vlbridge.checkpoint.live.shards import Model, Shard, check_complete, modules_of, shards_of
from megatron_vlbridge.checkpoint.stream.raw import check_fits, may_overflow
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, RuleTable, TensorSpec
from megatron_vlbridge.weights.regions import RegionIndex, check_exact_cover

_SOURCE = "the live model"
_ALIGNMENT = 16  # bytes; no dtype is wider

_Entry = tuple[Region, torch.dtype]


@dataclass(frozen=True)
class _Segment:
    """What one rank holds of the region `wanted`: the values at `place`, which are `source` in its shard `index`."""

    wanted: Region
    place: Region
    index: int
    source: Region
    dtype: torch.dtype
    start: int  # bytes from the start of what the rank sends


class LiveWeights:
    """The weights of a live, sharded model; `table` are its full Megatron tensors, without rows of padding.

    The constructor and every `fetch` are collective: all ranks call them in the same order. `dtype` converts all
    weights, on the rank that holds them. `options` must be the same on all ranks. `shards` gives what a module holds.

    Raises VLBridgeError, on all ranks, where the options differ, the model does not match the rules, some of its
    weights are on no rank or on two, or values are too large for `dtype`.
    """

    folder = Path(_SOURCE)
    files: tuple[Path, ...] = ()

    def __init__(
        self,
        model: Model,
        rules: RuleTable,
        dtype: torch.dtype | None,
        options: object = None,
        shards: Callable[[Any, RuleTable, str], list[Shard]] = shards_of,
    ) -> None:
        self.rank, self.size = rank_and_size()
        self._found: dict[Region, list[tuple[Region, torch.Tensor]]] = defaultdict(list)
        self._shards: list[Shard] = []
        sync_parameters(model)
        with raise_on_all_ranks():
            for module in modules_of(model):
                self._shards += [x for x in shards(module, rules, _SOURCE) if x.main and x.known is not None]
            for shard in self._shards:  # before any communication, in which a rank that fails leaves others waiting
                if dtype is not None and may_overflow(shard.values.dtype, dtype):
                    check_fits(f"{_SOURCE}: {shard.known}", shard.known_values, dtype)
        self.device = self._shards[0].values.device if self._shards else _default_device()
        mine = [(known, dtype or x.values.dtype) for x in self._shards if (known := x.known) is not None]
        everyone: list[tuple[Any, list[_Entry]]] = gather((options, mine))
        for rank, (theirs, _) in enumerate(everyone):
            if theirs != everyone[0][0]:
                raise VLBridgeError(
                    f"rank {rank}: expected the options of rank 0, {everyone[0][0]}, found {theirs}. "
                    "Call it with the same arguments on all ranks."
                )
        held = [entries for _, entries in everyone]
        _check_held(rules, held)
        self._dtypes = {region.name: dtype for entries in held for region, dtype in entries}
        self.table = {name: TensorSpec(shape, self._dtypes[name]) for name, shape in rules.megatron_shapes.items()}
        self._holders: dict[str, tuple[int, int]] = {}  # name of a shard in the index of regions -> rank, index there
        links = []
        for rank, entries in enumerate(held):
            for index, (region, _) in enumerate(entries):
                name = str(len(self._holders))
                self._holders[name] = rank, index
                links.append((region, Region.whole(name, region.shape), False))
        self._index = RegionIndex(links)

    def visit(self, call: Callable[[Region, torch.Tensor], None]) -> None:
        """Call `call` with every region that this rank holds and its values; raises on all ranks what it raises."""
        with raise_on_all_ranks():
            for shard in self._shards:
                if shard.known is not None:
                    call(shard.known, shard.known_values)

    def fetch(self, regions: Iterable[Region], receiver: int | None = None) -> None:
        """Bring the values of some regions to one rank, or to all where `receiver` is None, for `read_into` there.

        Holds as many bytes as the regions have until `release`, and on a rank that sends, meanwhile, what it sends.
        What a rank holds itself is not copied.
        """
        by_owner: dict[int, list[_Segment]] = defaultdict(list)
        for region in dict.fromkeys(regions):
            self._add(region, by_owner)
        for owner in sorted(by_owner):
            for segment, values in self._bring(owner, by_owner[owner], receiver):
                self._found[segment.wanted].append((segment.place, values))

    def release(self) -> None:
        """Forget what was fetched."""
        self._found.clear()

    def read_into(self, region: Region, out: torch.Tensor) -> None:
        """Copy values of the regions that were fetched into a tensor of the region's shape, converted to its dtype."""
        known = self._found.get(region)
        if known is None:  # a part of one
            known = [segment for other, found in self._found.items() if other.name == region.name for segment in found]
        covered = 0
        for place, values in known:
            common = place.intersection(region)
            if common is not None:
                out[common.within(region).slices].copy_(values[common.within(place).slices])
                covered += common.volume
        assert covered == out.numel(), f"{region} was not fetched"

    def _add(self, region: Region, by_owner: dict[int, list[_Segment]]) -> None:
        dtype = self._dtypes[region.name]
        for piece in self._index.pieces(region):
            rank, index = self._holders[piece.source.name]
            before = by_owner[rank]
            start = _end(before[-1]) if before else 0
            corner = tuple(a + b for a, b in zip(region.offset, piece.target.offset, strict=True))
            place = Region(region.name, corner, piece.target.shape)
            before.append(_Segment(region, place, index, piece.source, dtype, start))

    def _bring(
        self, owner: int, segments: Sequence[_Segment], receiver: int | None
    ) -> Iterator[tuple[_Segment, torch.Tensor]]:
        """What one rank holds of the regions, on the ranks that receive it."""
        receives, owns = receiver in (None, self.rank), owner == self.rank
        packed = None
        if self.size > 1 and receiver != owner and (receives or owns):
            packed = torch.empty(_end(segments[-1]), dtype=torch.uint8, device=self.device)
            if owns:
                for segment in segments:
                    _part(packed, segment).copy_(self._own(segment))
            if receiver is None:
                torch.distributed.broadcast(packed, owner)
            elif owns:
                torch.distributed.send(packed, receiver)
            else:
                torch.distributed.recv(packed, owner)
        if receives:
            for segment in segments:
                yield segment, self._own(segment) if owns or packed is None else _part(packed, segment)

    def _own(self, segment: _Segment) -> torch.Tensor:
        return self._shards[segment.index].known_values[segment.source.slices]


def sync_parameters(model: Model) -> None:
    """Gather the parameters that Megatron gathers only when the next forward pass needs them: they are the old ones."""
    modules: Sequence[Any] = model if isinstance(model, Sequence) else [model]
    for module in modules:
        ddp = getattr(module, "ddp_config", None)
        if ddp is not None and ddp.overlap_param_gather:
            module.start_param_sync(force_sync=True)


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _check_held(rules: RuleTable, held: Sequence[Sequence[_Entry]]) -> None:
    """Reject weights that are not on exactly one rank, or have several dtypes."""
    check_complete(rules, (region for entries in held for region, _ in entries), _SOURCE)
    regions: dict[str, list[Region]] = defaultdict(list)
    dtypes: dict[str, torch.dtype] = {}
    for rank, entries in enumerate(held):
        for region, dtype in entries:
            regions[region.name].append(region)
            if dtypes.setdefault(region.name, dtype) != dtype:
                text = f"expected {dtypes[region.name]}, as elsewhere, found {dtype} on rank {rank}"
                raise VLBridgeError(f"{_SOURCE}: {region.name}: {text}. Give a dtype to convert to.")
    for name, shape in rules.megatron_shapes.items():
        try:
            check_exact_cover(name, regions[name], shape)
        except VLBridgeError as error:
            raise VLBridgeError(
                f"{_SOURCE}: expected one rank to hold the main replica of each weight, found two: {error}. "
                "Check the replica_id in the module's sharded_state_dict."
            ) from error


def _nbytes(segment: _Segment) -> int:
    return segment.source.volume * segment.dtype.itemsize


def _end(segment: _Segment) -> int:
    """Where the next segment begins."""
    return segment.start + math.ceil(_nbytes(segment) / _ALIGNMENT) * _ALIGNMENT


def _part(packed: torch.Tensor, segment: _Segment) -> torch.Tensor:
    """The values of one segment in what its rank sends."""
    return packed[segment.start :][: _nbytes(segment)].view(segment.dtype).view(segment.source.shape)
