"""Weights stored as 8-bit floats with one scale for each block of 128 x 128 elements, read as bfloat16.

The weight `x` is `float8_e4m3fn`, `[..., out, in]`; `x_scale_inv` beside it, float32 or bfloat16, is
`[..., ceil(out / 128), ceil(in / 128)]`. A value is `float(x) * float(scale of its block)`, rounded once to bfloat16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.stream.raw import Stored, split
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import TensorSpec
from megatron_vlbridge.weights.regions import Shape

BLOCK = 128
SCALE = "_scale_inv"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_AT_ONCE = 2**19  # values that are held as float32, twice


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """A weight with its scales; `name` is that of the scales."""

    name: str
    weight: Stored
    scale: Stored

    @property
    def spec(self) -> TensorSpec:
        """What it is read as."""
        return TensorSpec(self.weight.spec.shape, torch.bfloat16)

    @property
    def path(self) -> Path:
        """The file of the weight."""
        return self.weight.path

    def read_into(self, offset: Shape, out: torch.Tensor) -> None:
        """Fill `out` with the rectangle of its shape at `offset`; only the scales of its own blocks are read.

        Raises OSError where a file ends too early, VLBridgeError where a scale is too large or not positive and
        finite.
        """
        for place, part in split(offset, out, _AT_ONCE):
            self._dequantise(place, part)

    def _dequantise(self, offset: Shape, out: torch.Tensor) -> None:
        rows, columns = (
            torch.arange(start, start + size) // BLOCK for start, size in zip(offset[-2:], out.shape[-2:], strict=True)
        )
        first = (int(rows[0]), int(columns[0]))
        last = (int(rows[-1]), int(columns[-1]))
        grid = tuple(b - a + 1 for a, b in zip(first, last, strict=True))
        scales = self._read_scales((*offset[:-2], *first), (*out.shape[:-2], *grid))
        stored = torch.empty(out.shape, dtype=self.weight.spec.dtype)
        self.weight.read_into(offset, stored)
        factors = scales[..., rows - first[0], :][..., columns - first[1]]
        weights = factors.mul_(stored.float()).bfloat16()
        if weights.isinf().any():  # float8_e4m3fn has no infinity
            raise VLBridgeError(
                f"{self.scale.path}: {self.name}: expected scales whose products fit bfloat16 (up to "
                f"{torch.finfo(torch.bfloat16).max:g}), found larger ones. The file is damaged: fetch it again."
            )
        out.copy_(weights)

    def _read_scales(self, offset: Shape, shape: Shape) -> torch.Tensor:
        scales = torch.empty(shape, dtype=torch.float32)
        self.scale.read_into(offset, scales)
        wrong = ~(scales.isfinite() & (scales > 0))
        if wrong.any():
            index = tuple(int(i) for i in wrong.nonzero()[0])
            place = [a + b for a, b in zip(offset, index, strict=True)]
            raise VLBridgeError(
                f"{self.scale.path}: {self.name}: expected positive finite scales, found {scales[index].item()} at "
                f"{place}. The file is damaged: fetch it again."
            )
        return scales

    def check_scales(self) -> None:
        """Read all scales, which are few; raises as `read_into` does."""
        self._read_scales((0,) * len(self.scale.spec.shape), self.scale.spec.shape)


def pair_scales(stored: Mapping[str, Stored]) -> dict[str, Stored | BlockScaled]:
    """The tensors of a checkpoint, with each 8-bit weight and its scales as one.

    Raises VLBridgeError, naming file and tensor, for an 8-bit weight without scales, scales without a weight, and those
    of another shape or dtype.
    """
    result: dict[str, Stored | BlockScaled] = {}
    for name, tensor in stored.items():
        weight = stored.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
        if name.endswith(SCALE) and (weight is None or weight.spec.dtype != torch.float8_e4m3fn):
            found = f"{name.removesuffix(SCALE)} as {weight.spec}" if weight else "no such weight"
            raise VLBridgeError(
                f"{tensor.path}: {name}: expected the scales of a float8_e4m3fn weight, found {found}. "
                "Fetch the files again."
            )
        if weight is None:
            is_fp8 = tensor.spec.dtype in _FP8
            result[name] = BlockScaled(name + SCALE, tensor, _scale_of(name, tensor, stored)) if is_fp8 else tensor
    return result


def _scale_of(name: str, weight: Stored, stored: Mapping[str, Stored]) -> Stored:
    """The scales of an 8-bit weight, after checking both shapes."""
    scale, shape = stored.get(name + SCALE), weight.spec.shape
    if scale is None:
        raise VLBridgeError(
            f"{weight.path}: {name}: expected {name + SCALE} beside {weight.spec}, found none. "
            "Without scales its values mean nothing: fetch the files again."
        )
    if weight.spec.dtype != torch.float8_e4m3fn or len(shape) not in (2, 3) or 0 in shape:
        raise VLBridgeError(
            f"{weight.path}: {name}: expected a matrix, or one for each expert, of float8_e4m3fn, found {weight.spec}. "
            "Other quantised checkpoints are not supported: use the unquantised one."
        )
    expected = (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))
    if scale.spec.shape != expected or scale.spec.dtype not in (torch.float32, torch.bfloat16):
        raise VLBridgeError(
            f"{scale.path}: {name + SCALE}: expected {list(expected)} in float32 or bfloat16, one for each "
            f"{BLOCK} x {BLOCK} block of {list(shape)}, found {scale.spec}. Fetch the files again."
        )
    return scale
