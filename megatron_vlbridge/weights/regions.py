"""Rectangles inside named tensors, and what lies where when two tensors share their numbers."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_vlbridge.errors import VLBridgeError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """The hyper-rectangle `[offset, offset + shape)` of the full tensor `name`.

    A rank's shard, a layer of a stacked tensor and a whole tensor are all regions; there is no other notion of a rank.
    """

    name: str
    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, name: str, shape: Shape) -> Region:
        """All of a tensor."""
        return cls(name, (0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def end(self) -> Shape:
        """The corner past the last number, per dim."""
        return tuple(start + size for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that takes it out of the full tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def intersection(self, other: Region) -> Region | None:
        """What both cover, or None. Only meaningful for two regions of one tensor."""
        start = tuple(map(max, self.offset, other.offset))
        size = tuple(min(a, b) - c for a, b, c in zip(self.end, other.end, start, strict=True))
        return Region(self.name, start, size) if all(extent > 0 for extent in size) else None

    def within(self, outer: Region) -> Region:
        """The same numbers, with offsets counted from the corner of `outer`."""
        offset = tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True))
        return Region(self.name, offset, self.shape)

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(f'{piece.start}:{piece.stop}' for piece in self.slices)}]"


@dataclass(frozen=True, slots=True)
class Move:
    """Two regions that hold the same numbers in the same order; one may have further leading dims of extent 1."""

    hf: Region
    megatron: Region

    def __post_init__(self) -> None:
        rank = min(len(self.hf.shape), len(self.megatron.shape))
        surplus = self.hf.shape[:-rank] + self.megatron.shape[:-rank] if rank else ()
        if self.hf.shape[-rank:] != self.megatron.shape[-rank:] or any(extent != 1 for extent in surplus):
            raise ValueError(f"{self.hf} and {self.megatron} do not hold the same rectangle")


@dataclass(frozen=True, slots=True)
class Piece:
    """`source` holds what belongs at `target`, whose offset is counted from the corner of the region asked for."""

    source: Region
    target: Region


class RegionIndex:
    """Finds, for a region of the tensors on one side, where the other side holds its numbers.

    `pairs` are (here, there) regions. Building is O(n log n), a query O(log n + found) while the regions of one tensor
    are cut along its first dim, as stacked layers and row blocks are.
    """

    def __init__(self, pairs: Iterable[tuple[Region, Region]]) -> None:
        by_name: dict[str, list[tuple[Region, Region]]] = defaultdict(list)
        for here, there in pairs:
            by_name[here.name].append((here, there))
        self._pairs = {name: sorted(found, key=lambda pair: pair[0].offset) for name, found in by_name.items()}
        self._starts = {name: [pair[0].offset[0] for pair in found] for name, found in self._pairs.items()}
        self._extent = {name: max(pair[0].shape[0] for pair in found) for name, found in self._pairs.items()}

    def regions(self, name: str) -> list[Region]:
        """The regions of one tensor, by offset."""
        return [here for here, _ in self._pairs[name]]

    @property
    def shapes(self) -> dict[str, Shape]:
        """The full shape of every tensor: the corner furthest from the origin that any region reaches."""
        return {
            name: tuple(max(ends) for ends in zip(*(here.end for here, _ in found), strict=True))
            for name, found in self._pairs.items()
        }

    def pieces(self, wanted: Region) -> list[Piece]:
        """What makes up `wanted`. Numbers that nobody covers have no piece; an unknown name has none at all."""
        found = []
        starts = self._starts.get(wanted.name, [])
        first = bisect_left(starts, wanted.offset[0] - self._extent[wanted.name] + 1) if starts else 0
        last = bisect_left(starts, wanted.end[0])
        for here, there in self._pairs.get(wanted.name, [])[first:last]:
            common = here.intersection(wanted)
            if common:
                found.append(Piece(_map(common.within(here), there), common.within(wanted)))
        return found


def _map(inner: Region, there: Region) -> Region:
    """The part of `there` that corresponds to `inner`, given relative to the region that `there` equals."""
    rank = len(there.shape)
    surplus = max(0, rank - len(inner.shape))
    offset = (0,) * surplus + inner.offset[len(inner.offset) - rank + surplus :]
    shape = (1,) * surplus + inner.shape[len(inner.shape) - rank + surplus :]
    return Region(there.name, tuple(a + b for a, b in zip(there.offset, offset, strict=True)), shape)


_LAYER = re.compile(r"^(?P<stack>.*\blayers)\.(?P<layer>\d+)\.(?P<rest>.+)$")


def stack_layers(region: Region) -> Region:
    """The canonical place of a Megatron region: `layers.7.x` is layer 7 of the stacked `layers.x`.

    Megatron stores layers stacked when they are all alike, one by one otherwise.
    """
    match = _LAYER.match(region.name)
    if not match:
        return region
    name = f"{match['stack']}.{match['rest']}"
    return Region(name, (int(match["layer"]), *region.offset), (1, *region.shape))


def check_exact_cover(name: str, regions: Sequence[Region], shape: Shape) -> None:
    """Raise VLBridgeError unless the regions tile a tensor of this shape: every number once."""
    volume, size = sum(region.volume for region in regions), math.prod(shape)
    if volume != size:
        raise VLBridgeError(f"{name}: its parts hold {volume} numbers, its shape {list(shape)} has {size}")
    overlap = _find_overlap(list(regions), 0)
    if overlap:
        raise VLBridgeError(f"{name}: two of its parts overlap: {overlap[0]} and {overlap[1]}")


def _find_overlap(regions: list[Region], dim: int) -> tuple[Region, Region] | None:
    """Two regions that overlap in `dim` and all later dims. Sweeps along `dim`, then inside runs of equal extents."""
    if len(regions) < 2:
        return None
    if dim == len(regions[0].shape):
        return regions[0], regions[1]
    regions = sorted(regions, key=lambda region: region.offset[dim])
    run: list[Region] = []
    end = 0
    for region in [*regions, None]:
        if region is not None and (not run or region.offset[dim] < end):
            run.append(region)
            end = max(end, region.end[dim])
            continue
        overlap = _find_overlap_in_run(run, dim)
        if overlap or region is None:
            return overlap
        run, end = [region], region.end[dim]
    return None


def _find_overlap_in_run(run: list[Region], dim: int) -> tuple[Region, Region] | None:
    if len({(region.offset[dim], region.shape[dim]) for region in run}) == 1:
        return _find_overlap(run, dim + 1)
    for number, region in enumerate(run):
        for other in run[number + 1 :]:
            if region.intersection(other):
                return region, other
    return None
