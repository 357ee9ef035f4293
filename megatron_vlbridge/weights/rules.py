"""The invertible rules that say which values of Hugging Face tensors are which values of Megatron's.

A rule is data. It expands to `Move`s between regions of full tensors; every use (import, export, a live model's slices,
one layer, one rank) asks the same moves, so there is no second description that could disagree.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_vlbridge.weights.regions import Move, Piece, Region, RegionIndex, Shape, mixed_stacks, stack_layers


@dataclass(frozen=True)
class Copy:
    """One whole HF tensor is one whole Megatron tensor, or one layer of a stacked one.

    `padded_rows`: Megatron may hold more rows than HF, as it pads the vocabulary to a multiple of the tensor-parallel
    size.
    """

    hf: str
    megatron: str
    shape: Shape
    layer: int | None = None
    padded_rows: bool = False

    def moves(self) -> Iterator[Move]:
        """One move."""
        rows = (0, self.shape[0])
        yield Move(Region.whole(self.hf, self.shape), _rows(self.megatron, self.layer, rows, self.shape[1:]))


@dataclass(frozen=True)
class RowBlocks:
    """Rows of HF tensors, block after block, are one Megatron tensor: `blocks` are (HF tensor, first row, rows)."""

    megatron: str
    blocks: tuple[tuple[str, int, int], ...]
    columns: Shape
    layer: int | None = None

    def moves(self) -> Iterator[Move]:
        """One move per block."""
        row = 0
        for hf, first, rows in self.blocks:
            target = _rows(self.megatron, self.layer, (row, rows), self.columns)
            yield Move(_rows(hf, None, (first, rows), self.columns), target)
            row += rows


def grouped_qkv(
    q: str,
    k: str,
    v: str,
    megatron: str,
    num_heads: int,
    num_groups: int,
    head_dim: int,
    columns: Shape,
    layer: int | None = None,
    gated: bool = False,
) -> RowBlocks:
    """q, k, v -> Megatron's `linear_qkv`: for each KV group its q heads, then its k head, then its v head.

    Where `gated`, HF's q holds for each head its query and then its output gate; Megatron has all gates of a group
    after its q heads.
    """
    heads, blocks = num_heads // num_groups, []
    for group in range(num_groups):
        first = group * heads
        if gated:
            blocks += [(q, 2 * head + part, 1) for part in (0, 1) for head in range(first, first + heads)]
        else:
            blocks.append((q, first, heads))
        blocks += [(k, group, 1), (v, group, 1)]
    rows = tuple((hf, start * head_dim, count * head_dim) for hf, start, count in blocks)
    return RowBlocks(megatron, rows, columns, layer)


def vision_qkv(
    hf: str, megatron: str, num_heads: int, head_dim: int, columns: Shape, layer: int | None = None
) -> RowBlocks:
    """The vision tower's fused qkv: HF holds all q, all k, all v; Megatron for each head its q, k, v."""
    places = [part * num_heads + head for head in range(num_heads) for part in range(3)]
    return RowBlocks(megatron, tuple((hf, place * head_dim, head_dim) for place in places), columns, layer)


def gate_up(gate: str, up: str, megatron: str, rows: int, columns: Shape, layer: int | None = None) -> RowBlocks:
    """Gate and up of a SwiGLU MLP -> Megatron's `linear_fc1`: all gate rows, then all up rows."""
    return RowBlocks(megatron, ((gate, 0, rows), (up, 0, rows)), columns, layer)


@dataclass(frozen=True)
class SplitRows:
    """The rows of one HF tensor, part by part, are whole Megatron tensors: `parts` are (name, rows)."""

    hf: str
    parts: tuple[tuple[str, int], ...]
    columns: Shape

    def moves(self) -> Iterator[Move]:
        """One move per part."""
        row = 0
        for name, rows in self.parts:
            source = _rows(self.hf, None, (row, rows), self.columns)
            yield Move(source, _rows(name, None, (0, rows), self.columns))
            row += rows


@dataclass(frozen=True)
class FusedExperts:
    """One HF tensor holds a linear of all experts of a layer, as Megatron does: `shape` `[E, out, in]`.

    Where `transposed`, HF holds it as `[E, in, out]`.
    """

    hf: str
    megatron: str
    shape: tuple[int, int, int]
    layer: int | None = None
    transposed: bool = False

    def moves(self) -> Iterator[Move]:
        """One move."""
        experts, rows, columns = self.shape
        shape = (experts, columns, rows) if self.transposed else self.shape
        target = _rows(self.megatron, self.layer, (0, experts), (rows, columns))
        yield Move(Region.whole(self.hf, shape), target, self.transposed)


@dataclass(frozen=True)
class SingleExperts:
    """HF holds each expert's linears in tensors of their own; Megatron those of a layer in one `[E, out, in]`.

    `hf` are name templates with a place for the expert, such as `experts.{}.gate_proj.weight`. Their rows, as many of
    each, follow one another in Megatron's tensor.
    """

    hf: tuple[str, ...]
    megatron: str
    shape: tuple[int, int, int]
    layer: int | None = None

    def moves(self) -> Iterator[Move]:
        """One move per expert and template."""
        experts, rows, columns = self.shape
        rows //= len(self.hf)
        stack = () if self.layer is None else (self.layer,)
        for expert in range(experts):
            for index, name in enumerate(self.hf):
                target = Region(
                    self.megatron, (*stack, expert, index * rows, 0), (*(1 for _ in stack), 1, rows, columns)
                )
                yield Move(Region.whole(name.format(expert), (rows, columns)), target)


Rule = Copy | RowBlocks | SplitRows | FusedExperts | SingleExperts


def _rows(name: str, layer: int | None, rows: tuple[int, int], columns: Shape) -> Region:
    """Rows `(start, count)` with all columns, of a tensor or of one layer of a stacked tensor."""
    stack, extent = ((), ()) if layer is None else ((layer,), (1,))
    return Region(name, (*stack, rows[0], *(0,) * len(columns)), (*extent, rows[1], *columns))


class RuleTable:
    """All rules of one checkpoint, and the questions that can be asked of them.

    Example: `table.hf_sources(Region("...linear_qkv.weight", (layer, start, 0), (1, rows, hidden)))` lists which slices
    of `q_proj`, `k_proj` and `v_proj` make a tensor-parallel rank's shard, and where in the shard each belongs.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self.moves = tuple(move for rule in self.rules for move in rule.moves())
        self.hf = RegionIndex((move.hf, move.megatron, move.transposed) for move in self.moves)
        self.megatron = RegionIndex((move.megatron, move.hf, move.transposed) for move in self.moves)
        self.hf_shapes: dict[str, Shape] = self.hf.shapes
        self.megatron_shapes: dict[str, Shape] = self.megatron.shapes
        self.padded = frozenset(rule.megatron for rule in self.rules if isinstance(rule, Copy) and rule.padded_rows)
        self._mixed = mixed_stacks(self.megatron_shapes)

    def canonical(self, region: Region) -> Region:
        """Where the table has a region of a Megatron tensor, whose layers may be stored stacked or one by one."""
        return stack_layers(region, self._mixed)

    def hf_sources(self, region: Region) -> list[Piece]:
        """The HF regions whose values make up a region of a Megatron tensor (stacked or `layers.N.`)."""
        canonical = self.canonical(region)
        pieces = self.megatron.pieces(canonical)
        surplus = len(canonical.shape) - len(region.shape)
        if not surplus:
            return pieces
        return [
            replace(p, target=Region(region.name, p.target.offset[surplus:], p.target.shape[surplus:])) for p in pieces
        ]

    def megatron_sources(self, region: Region) -> list[Piece]:
        """The regions of (stacked) Megatron tensors whose values make up a region of an HF tensor."""
        return self.hf.pieces(region)

    def to_megatron(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Full HF tensors in memory -> full Megatron tensors."""
        return {
            name: assemble(self.hf_sources(Region.whole(name, shape)), shape, tensors)
            for name, shape in self.megatron_shapes.items()
        }

    def to_hf(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Full Megatron tensors in memory -> full HF tensors. Padded vocabulary rows are left out."""
        return {
            name: assemble(self.megatron_sources(Region.whole(name, shape)), shape, tensors)
            for name, shape in self.hf_shapes.items()
        }


def assemble(pieces: Iterable[Piece], shape: Shape, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A new tensor of `shape` filled from the pieces, all of whose sources are in memory and have one dtype."""
    pieces = list(pieces)
    result = torch.empty(shape, dtype=tensors[pieces[0].source.name].dtype)
    for piece in pieces:
        piece.place(result).copy_(tensors[piece.source.name][piece.source.slices])
    return result
