"""The proof, from names, shapes and dtypes alone, that a checkpoint and the rules fit each other."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights.regions import Move, Shape, check_exact_cover
from megatron_vlbridge.weights.rules import RuleTable

_SHOWN = 8
_EXTRA = "extra Hugging Face tensors"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the numbers in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


TensorTable = Mapping[str, TensorSpec]


class MismatchError(VLBridgeError):
    """Tensors that do not fit each other. The message shows the first of each kind, `mismatches` all: kind -> lines.

    Example: `error.mismatches["missing Hugging Face tensors"]` may be `["lm_head.weight: expected [151936, 2048]"]`.
    """

    def __init__(self, message: str, mismatches: Mapping[str, Sequence[str]]) -> None:
        super().__init__(message, mismatches)  # both, as what is pickled is made again from them
        self.mismatches = {kind: list(lines) for kind, lines in mismatches.items()}

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def misfits(self) -> dict[str, list[str]]:
        """The former name of `mismatches`."""
        return self.mismatches


MisfitError = MismatchError  # its former name


@dataclass
class _Mismatches:
    """Everything that does not fit, by kind."""

    lines: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, line: str) -> None:
        self.lines[kind].append(line)

    def raise_if_any(self, hf: str, megatron: str) -> None:
        if not self.lines:
            return
        total = sum(map(len, self.lines.values()))
        text = [f"the tensors of {hf} and of {megatron} do not fit each other in {total} places:"]
        mismatches = {kind: sorted(lines) for kind, lines in self.lines.items()}
        for kind, lines in mismatches.items():
            text.append(f"  {kind} ({len(lines)}):")
            text += [f"    {line}" for line in lines[:_SHOWN]]
            if len(lines) > _SHOWN:
                text.append(f"    and {len(lines) - _SHOWN} more")
        text.append("Use the config.json that belongs to these weights, and fetch damaged or missing files again.")
        if _EXTRA in self.lines:
            text.append("An import ignores extra tensors that --ignore (in Python: ignore=) names.")
        if any(len(lines) > _SHOWN for lines in mismatches.values()):
            text.append(f"All {total} are listed with --json, and in the error's mismatches.")
        raise MismatchError("\n".join(text), mismatches)


class Plan:
    """Two tables of tensors that the rules turn into each other, every number once.

    `cast` permits a dtype that differs between the sides; `upcast` are the Megatron tensors that hold 16-bit numbers
    as float32, as some of their layers or parts are. `hf_source` and `megatron_source` name the folders in errors.
    `notes` says in words what is not a plain move, such as padded rows that are cut.

    Raises MismatchError with all mismatches, grouped: missing, extra, covered twice or not at all, of the wrong shape
    or dtype.
    """

    def __init__(
        self,
        table: RuleTable,
        hf: TensorTable,
        megatron: TensorTable,
        *,
        cast: bool = False,
        upcast: Collection[str] = (),
        hf_source: str = "the Hugging Face side",
        megatron_source: str = "the Megatron side",
    ) -> None:
        self.table, self.hf, self.megatron = table, dict(hf), dict(megatron)
        self.upcast = upcast
        self.notes = [
            f"{name}: float32, as some of its parts are; the others are in 16 bits" for name in sorted(upcast)
        ]
        mismatches = _Mismatches()
        self._check_cover(mismatches)
        self._check_side(mismatches, "Hugging Face", self.hf, table.hf_shapes, frozenset())
        self._check_side(mismatches, "Megatron", self.megatron, table.megatron_shapes, table.padded)
        if not cast:
            self._check_dtypes(mismatches)
        mismatches.raise_if_any(hf_source, megatron_source)

    @property
    def nbytes(self) -> int:
        """Bytes of the Hugging Face side."""
        return sum(spec.nbytes for spec in self.hf.values())

    def _check_cover(self, mismatches: _Mismatches) -> None:
        for index, shapes in ((self.table.hf, self.table.hf_shapes), (self.table.megatron, self.table.megatron_shapes)):
            for name, shape in shapes.items():
                try:
                    check_exact_cover(name, index.regions(name), shape)
                except VLBridgeError as error:
                    mismatches.add("not covered exactly once by the rules", str(error))

    def _check_side(
        self,
        mismatches: _Mismatches,
        side: str,
        found: TensorTable,
        expected: Mapping[str, Shape],
        padded: frozenset[str],
    ) -> None:
        for name in expected.keys() - found.keys():
            mismatches.add(f"missing {side} tensors", f"{name}: expected {list(expected[name])}")
        for name in found.keys() - expected.keys():
            mismatches.add(
                _EXTRA if side == "Hugging Face" else f"extra {side} tensors",
                f"{name}: {found[name]}, expected none of this name",
            )
        for name in expected.keys() & found.keys():
            shape, wanted = found[name].shape, expected[name]
            if shape == wanted:
                continue
            if name in padded and shape[1:] == wanted[1:] and shape[0] > wanted[0]:
                self.notes.append(
                    f"{name}: {shape[0] - wanted[0]} rows of padding after the {wanted[0]} of the vocabulary"
                )
            else:
                mismatches.add(
                    f"{side} tensors of the wrong shape", f"{name}: expected {list(wanted)}, found {list(shape)}"
                )

    def _check_dtypes(self, mismatches: _Mismatches) -> None:
        seen: set[tuple[str, str]] = set()
        names = [(move.megatron.name, move.hf.name) for move in self.table.moves if move.hf.name in self.hf]
        alike = {(megatron, self.hf[name].dtype): name for megatron, name in reversed(names)}
        for move in self.table.moves:
            pair = (move.hf.name, move.megatron.name)
            if pair not in seen and self._dtypes_differ(move):
                ours, theirs = self.hf[pair[0]].dtype, self.megatron[pair[1]].dtype
                like = f" as {alike[pair[1], theirs]} is" if (pair[1], theirs) in alike else ""
                text = f"{pair[0]} is {ours}, {pair[1]} is {theirs}{like}: give a dtype to convert to"
                mismatches.add("dtypes that differ", text)
            seen.add(pair)

    def _dtypes_differ(self, move: Move) -> bool:
        hf, megatron = self.hf.get(move.hf.name), self.megatron.get(move.megatron.name)
        if hf is None or megatron is None or hf.dtype == megatron.dtype:
            return False
        return not (move.megatron.name in self.upcast and megatron.dtype == torch.float32 and hf.dtype.itemsize == 2)
