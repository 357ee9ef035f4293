"""Rectangles inside named tensors, and which regions of two tensors hold the same values."""

import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

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
    def whole(cls, name: str, shape: Shape) -> "Region":
        """All of a tensor."""
        return cls(name, (0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> Shape:
        """The corner past the last element, per dim."""
        return tuple(start + size for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that takes it out of the full tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def intersection(self, other: "Region") -> "Region | None":
        """What both cover, or None. Only meaningful for two regions of one tensor."""
        start = tuple(map(max, self.offset, other.offset))
        size = tuple(min(a, b) - c for a, b, c in zip(self.end, other.end, start, strict=True))
        return Region(self.name, start, size) if all(extent > 0 for extent in size) else None

    def within(self, outer: "Region") -> "Region":
        """The same region, with offsets counted from the corner of `outer`."""
        offset = tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True))
        return Region(self.name, offset, self.shape)

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(f'{piece.start}:{piece.stop}' for piece in self.slices)}]"


@dataclass(frozen=True, slots=True)
class Move:
    """Two regions that hold the same values in the same order; one may have more leading dims, of extent 1.

    Where `transposed`, the last two dims of one are those of the other swapped.
    """

    hf: Region
    megatron: Region
    transposed: bool = False

    def __post_init__(self) -> None:
        ours = _swap(self.hf.shape) if self.transposed else self.hf.shape
        rank = min(len(ours), len(self.megatron.shape))
        surplus = ours[:-rank] + self.megatron.shape[:-rank] if rank else ()
        if ours[-rank:] != self.megatron.shape[-rank:] or any(extent != 1 for extent in surplus):
            raise ValueError(f"{self.hf} and {self.megatron} do not hold the same rectangle")


@dataclass(frozen=True, slots=True)
class Piece:
    """`source` holds what belongs at `target`, whose offset is counted from the corner of the region asked for.

    Where `transposed`, the last two dims of the source are those of the target swapped.
    """

    source: Region
    target: Region
    transposed: bool = False

    def place(self, out: torch.Tensor) -> torch.Tensor:
        """Where the values of `source` go in `out`, the region asked for: a view in the source's own shape."""
        part = out[self.target.slices]
        return (part.transpose(-1, -2) if self.transposed else part).view(self.source.shape)


class RegionIndex:
    """Finds, for a region of the tensors on one side, where the other side holds its values.

    `links` are (here, there, transposed). Building is O(n log n), a query O(log n + found) while the regions of one
    tensor are cut along its first dim, or along the first that is longer than 1 in all of them: layers of a stacked
    tensor, experts of a layer, blocks of rows.
    """

    def __init__(self, links: Iterable[tuple[Region, Region, bool]]) -> None:
        by_name: dict[str, list[tuple[Region, Region, bool]]] = defaultdict(list)
        for link in links:
            by_name[link[0].name].append(link)
        self._links = {name: sorted(found, key=lambda link: link[0].offset) for name, found in by_name.items()}
        self._offsets = {name: [link[0].offset for link in found] for name, found in self._links.items()}
        self._extents = {
            name: tuple(max(extents) for extents in zip(*(link[0].shape for link in found), strict=True))
            for name, found in self._links.items()
        }

    def regions(self, name: str) -> list[Region]:
        """The regions of one tensor, by offset."""
        return [here for here, _, _ in self._links[name]]

    @property
    def shapes(self) -> dict[str, Shape]:
        """The full shape of every tensor: the corner furthest from the origin that any region reaches."""
        return {
            name: tuple(max(ends) for ends in zip(*(here.end for here, _, _ in found), strict=True))
            for name, found in self._links.items()
        }

    def pieces(self, wanted: Region) -> list[Piece]:
        """What makes up `wanted`. Elements that no region covers have no piece; an unknown name has none."""
        found = []
        for here, there, transposed in self._candidates(wanted):
            common = here.intersection(wanted)
            if common:
                inner = common.within(here)
                source = _map(_transpose(inner) if transposed else inner, there)
                found.append(Piece(source, common.within(wanted), transposed))
        return found

    def _candidates(self, wanted: Region) -> list[tuple[Region, Region, bool]]:
        """The links between the first and the last, by offset, that can reach `wanted`."""
        offsets = self._offsets.get(wanted.name, [])
        if not offsets or not wanted.shape:
            return self._links.get(wanted.name, [])
        extents = self._extents[wanted.name]
        # While both sides are one index wide in a dim, only that index matters, and the next dim is sorted within it.
        dim = 0
        while dim < len(extents) - 1 and extents[dim] == 1 and wanted.shape[dim] == 1:
            dim += 1
        fixed = wanted.offset[:dim]
        first = bisect_left(offsets, (*fixed, wanted.offset[dim] - extents[dim] + 1))
        last = bisect_left(offsets, (*fixed, wanted.end[dim]))
        return self._links[wanted.name][first:last]


def _swap(values: Shape) -> Shape:
    return (*values[:-2], values[-1], values[-2])


def _transpose(region: Region) -> Region:
    return Region(region.name, _swap(region.offset), _swap(region.shape))


def _map(inner: Region, there: Region) -> Region:
    """The part of `there` that corresponds to `inner`, given relative to the region that `there` equals."""
    rank = len(there.shape)
    surplus = max(0, rank - len(inner.shape))
    offset = (0,) * surplus + inner.offset[len(inner.offset) - rank + surplus :]
    shape = (1,) * surplus + inner.shape[len(inner.shape) - rank + surplus :]
    return Region(there.name, tuple(a + b for a, b in zip(there.offset, offset, strict=True)), shape)


_LAYER = re.compile(r"^(?P<stack>.*\blayers)\.(?P<layer>\d+)\.(?P<rest>.+)$")


def mixed_stacks(names: Iterable[str]) -> frozenset[str]:
    """The stacks of layers, such as `decoder.layers`, in which some layer has a tensor that another lacks.

    Megatron stores the layers of such a stack one by one, `layers.7.x`, and has no other name for them. It always does
    so with the MTP layers, `mtp.layers`.
    """
    layers: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for match in filter(None, map(_LAYER.match, names)):
        layers[match["stack"]][match["rest"]].add(int(match["layer"]))
    return frozenset(
        stack
        for stack, parts in layers.items()
        if stack.endswith("mtp.layers") or any(found != next(iter(parts.values())) for found in parts.values())
    )


def stack_layers(region: Region, mixed: Collection[str] = ()) -> Region:
    """The canonical place of a Megatron region: `layers.7.x` is layer 7 of the stacked `layers.x`.

    Megatron stores layers stacked when they are all alike, one by one otherwise or on request. `mixed` names the
    stacks whose layers are not alike; they stay as they are.
    """
    match = _LAYER.match(region.name)
    if not match or match["stack"] in mixed:
        return region
    name = f"{match['stack']}.{match['rest']}"
    return Region(name, (int(match["layer"]), *region.offset), (1, *region.shape))


def check_exact_cover(name: str, regions: Sequence[Region], shape: Shape) -> None:
    """Raise VLBridgeError unless the regions tile a tensor of this shape: every element once."""
    volume, size = sum(region.volume for region in regions), math.prod(shape)
    if volume != size:
        raise VLBridgeError(f"{name}: its parts hold {volume} elements, its shape {list(shape)} has {size}")
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
    for index, region in enumerate(run):
        for other in run[index + 1 :]:
            if region.intersection(other):
                return region, other
    return None
