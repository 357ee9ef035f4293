"""The check, from names, shapes and dtypes alone, that a checkpoint and the rules match."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights.regions import Move, Shape, check_exact_cover
from megatron_vlbridge.weights.rules import RuleTable

_SHOWN = 8
_EXTRA = "extra {} tensors"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


TensorTable = Mapping[str, TensorSpec]


def any_dtype(shapes: Mapping[str, Shape]) -> dict[str, TensorSpec]:
    """Tensors of these shapes, for a side of a plan whose dtypes do not matter (`cast`)."""
    return {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}


class MismatchError(VLBridgeError):
    """Tensors that do not match. The message shows the first of each kind, `mismatches` all: kind -> lines.

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


class Plan:
    """Two tables of tensors that the rules turn into each other, every value once.

    `cast` permits a dtype that differs between the sides; `upcast` are the Megatron tensors that hold 16-bit values
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
        self._mismatches: dict[str, list[str]] = defaultdict(list)
        self._check_cover()
        self._check_side("Hugging Face", self.hf, table.hf_shapes)
        self._check_side("Megatron", self.megatron, table.megatron_shapes)
        if not cast:
            self._check_dtypes()
        if self._mismatches:
            raise _mismatch_error(self._mismatches, hf_source, megatron_source)

    def _check_cover(self) -> None:
        for index, shapes in ((self.table.hf, self.table.hf_shapes), (self.table.megatron, self.table.megatron_shapes)):
            for name, shape in shapes.items():
                try:
                    check_exact_cover(name, index.regions(name), shape)
                except VLBridgeError as error:
                    self._mismatches["not covered exactly once by the rules"].append(str(error))

    def _check_side(self, side: str, found: TensorTable, shapes: Mapping[str, Shape]) -> None:
        for name in shapes.keys() - found.keys():
            self._mismatches[f"missing {side} tensors"].append(f"{name}: expected {list(shapes[name])}")
        for name in found.keys() - shapes.keys():
            self._mismatches[_EXTRA.format(side)].append(f"{name}: {found[name]}, expected none of this name")
        for name in shapes.keys() & found.keys():
            shape, expected = found[name].shape, shapes[name]
            if shape == expected:
                continue
            # Names of the Hugging Face side are never those of a padded tensor.
            if name in self.table.padded and shape[1:] == expected[1:] and shape[0] > expected[0]:
                rows = f"{shape[0] - expected[0]} rows of padding after the {expected[0]} of the vocabulary"
                self.notes.append(f"{name}: {rows}")
            else:
                text = f"{name}: expected {list(expected)}, found {list(shape)}"
                self._mismatches[f"{side} tensors of the wrong shape"].append(text)

    def _check_dtypes(self) -> None:
        seen: set[tuple[str, str]] = set()
        names = [(move.megatron.name, move.hf.name) for move in self.table.moves if move.hf.name in self.hf]
        alike = {(megatron, self.hf[name].dtype): name for megatron, name in reversed(names)}
        for move in self.table.moves:
            pair = (move.hf.name, move.megatron.name)
            if pair not in seen and self._dtypes_differ(move):
                ours, theirs = self.hf[pair[0]].dtype, self.megatron[pair[1]].dtype
                like = f" as {alike[pair[1], theirs]} is" if (pair[1], theirs) in alike else ""
                text = f"{pair[0]} is {ours}, {pair[1]} is {theirs}{like}: give a dtype to convert to"
                self._mismatches["dtypes that differ"].append(text)
            seen.add(pair)

    def _dtypes_differ(self, move: Move) -> bool:
        hf, megatron = self.hf.get(move.hf.name), self.megatron.get(move.megatron.name)
        if hf is None or megatron is None or hf.dtype == megatron.dtype:
            return False
        return not (move.megatron.name in self.upcast and megatron.dtype == torch.float32 and hf.dtype.itemsize == 2)


def _mismatch_error(found: Mapping[str, Sequence[str]], hf: str, megatron: str) -> MismatchError:
    total = sum(map(len, found.values()))
    text = [f"the tensors of {hf} and of {megatron} do not match in {total} places:"]
    mismatches = {kind: sorted(lines) for kind, lines in found.items()}
    for kind, lines in mismatches.items():
        text.append(f"  {kind} ({len(lines)}):")
        text += [f"    {line}" for line in lines[:_SHOWN]]
        if len(lines) > _SHOWN:
            text.append(f"    and {len(lines) - _SHOWN} more")
    text.append("Use the config.json that belongs to these weights, and fetch damaged or missing files again.")
    if _EXTRA.format("Hugging Face") in found:
        text.append("An import ignores extra tensors that --ignore (in Python: ignore=) names.")
    if any(len(lines) > _SHOWN for lines in mismatches.values()):
        text.append(f"All {total} are listed with --json, and in the error's mismatches.")
    return MismatchError("\n".join(text), mismatches)
