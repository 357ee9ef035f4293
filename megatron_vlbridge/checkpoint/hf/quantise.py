"""Weights written as 8-bit floats with one scale for each block of 128 x 128 elements, as `fp8.py` reads them.

Of a block `w` with the largest magnitude `a`, the scale is `a / 448` in float32, and the values are `w / scale` rounded
to the nearest float8_e4m3fn, ties to even. The scale is at least the smallest normal float32, also of a block of zeros:
GPUs may take smaller ones as zero.
"""

from collections.abc import Collection, Iterator, Mapping

import torch

from megatron_vlbridge.checkpoint.hf.fp8 import BLOCK, SCALE
from megatron_vlbridge.checkpoint.hf.writer import Reads
from megatron_vlbridge.checkpoint.stream.parts import row_blocks
from megatron_vlbridge.checkpoint.stream.raw import Filler
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.fp8 import is_quantised, unquantised_modules
from megatron_vlbridge.weights import Region, TensorSpec
from megatron_vlbridge.weights.regions import Shape

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_DTYPES = (torch.float32, torch.bfloat16)
_AT_ONCE = 2**20  # elements that are quantised at once
_TILE_BYTES = 10 * _AT_ONCE  # of their factors, quotients and values
_COLUMNS = 64 * BLOCK


def quantised_specs(specs: Mapping[str, TensorSpec], others: Collection[str] = ()) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint with its linear layers in FP8, the scales of each after it.

    The `others` are not part of the model and stay as they are.

    Raises VLBridgeError for dtypes that are not read back beside FP8, which is read as bfloat16.
    """
    result: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if name in others:
            result[name] = spec
            continue
        if spec.dtype not in _DTYPES:
            raise VLBridgeError(
                f"{name}: expected float32 or bfloat16 for an export in FP8, found {spec}. Give dtype bfloat16 "
                "(--dtype bf16)."
            )
        result[name] = spec
        if is_quantised(name):
            result[name] = TensorSpec(spec.shape, FP8)
            result[name + SCALE] = TensorSpec(scale_shape(spec.shape), torch.float32)
    return result


def specs_as_read(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of `quantised_specs` as `SafetensorsFolder` has them: dequantised, without scales."""
    scales = {name + SCALE for name, spec in specs.items() if spec.dtype == FP8}
    return {
        name: TensorSpec(spec.shape, torch.bfloat16) if spec.dtype == FP8 else spec
        for name, spec in specs.items()
        if name not in scales
    }


def scale_shape(shape: Shape) -> Shape:
    """Of the scales of a matrix."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantise(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values, float8_e4m3fn, and the scales `[ceil(out / 128), ceil(in / 128)]`, float32, of a matrix `[out, in]`.

    The weight is float32 or bfloat16; values and scales are on its device, where some MiB are held besides.

    Raises VLBridgeError, naming the tensor, for a value that is not finite, or whose FP8 form overflows in bfloat16.
    Example: `quantise("x", torch.ones(300, 200))[1]` has the shape `[3, 2]`, and all scales are 1 / 448.
    """
    scales = _scales(name, weight)
    values = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    _fill_values(weight, scales, values)
    return values, scales


def check_quantisable(name: str, weight: torch.Tensor) -> None:
    """Raise what `quantise` raises for a matrix of which this is a part, of any shape."""
    if weight.numel():
        low, high = torch.aminmax(weight)
        _check_largest(name, torch.maximum(-low, high).float())


def weight_region(region: Region, specs: Mapping[str, TensorSpec]) -> Region:
    """The rows of a weight whose scales a region of whole rows of scales has; any other region as it is."""
    name = region.name.removesuffix(SCALE)
    if region.name in specs or name not in specs:
        return region
    rows, columns = specs[name].shape
    start, end = (min(row * BLOCK, rows) for row in (region.offset[0], region.end[0]))
    return Region(name, (start, 0), (end - start, columns))


def quantised_output(
    specs: Mapping[str, TensorSpec], fill: Filler, others: Collection[str]
) -> tuple[dict[str, TensorSpec], Filler, Reads]:
    """What `SafetensorsWriter` takes to write these tensors in FP8: tensors, filler, and what that reads.

    `fill` fills regions of `specs`; `others` are those of them that are not part of the model. Errors are those of
    `quantised_specs`, and of `quantise` where values are filled.
    """
    written = quantised_specs(specs, others)
    quantised = {name: specs[name] for name, spec in written.items() if spec.dtype == FP8}
    bytes_read = {name: spec.dtype.itemsize for name, spec in quantised.items()}
    bytes_read |= {name + SCALE: BLOCK**2 * size for name, size in bytes_read.items()}
    strips = (max(_AT_ONCE, BLOCK * spec.shape[1]) * spec.dtype.itemsize for spec in quantised.values())
    return written, _quantising(fill, specs), Reads(bytes_read, max(strips, default=0) + _TILE_BYTES)


def quantization_config(specs: Mapping[str, TensorSpec], head: str) -> dict[str, object]:
    """The entry of `config.json` by which transformers, vLLM and sglang know an FP8 checkpoint with these tensors.

    `head` names the output head, which is no tensor where it is tied.
    """
    weights = [name for name, spec in specs.items() if name.endswith(".weight") and spec.dtype != FP8]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": unquantised_modules([head, *weights]),
    }


def _quantising(fill: Filler, specs: Mapping[str, TensorSpec]) -> Filler:
    """Fills regions of quantised tensors, from what `fill` gives for those of `specs`.

    Regions of values are blocks of whole rows, from a multiple of 128 on; so `row_blocks` cuts them. Those of scales
    are whole rows too.
    """

    def quantised(region: Region, out: torch.Tensor) -> None:
        wanted = weight_region(region, specs)
        for strip in row_blocks(wanted, 1, _AT_ONCE, multiple=BLOCK):
            weight = torch.empty(strip.shape, dtype=specs[strip.name].dtype)
            fill(strip, weight)
            scales, place = _scales(strip.name, weight), strip.within(wanted)
            if out.dtype == FP8:
                _fill_values(weight, scales, out[place.slices])
            else:
                out[place.offset[0] // BLOCK :][: len(scales)] = scales

    def fill_any(region: Region, out: torch.Tensor) -> None:
        (quantised if out.dtype == FP8 or region.name not in specs else fill)(region, out)

    return fill_any


def _scales(name: str, weight: torch.Tensor) -> torch.Tensor:
    largest = torch.empty(scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    for place, blocks in _tiles(weight):
        part = weight[place].abs()
        rest = [-size % BLOCK for size in part.shape]
        padded = torch.nn.functional.pad(part, (0, rest[1], 0, rest[0]))
        largest[blocks] = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3)).float()
    _check_largest(name, largest)
    return _scale(largest).clamp_(min=_SMALLEST_SCALE)


def _scale(largest: torch.Tensor) -> torch.Tensor:
    # By a tensor: CUDA multiplies by the reciprocal of a Python number, which is not the same.
    return largest / torch.full_like(largest, _LARGEST)


def _fill_values(weight: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
    for place, blocks in _tiles(weight):
        part = weight[place]
        factors = scales[blocks].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        # Rounding takes what division leaves above 448 back to it.
        values[place] = torch.div(part, factors[: part.shape[0], : part.shape[1]]).to(FP8)


def _tiles(weight: torch.Tensor) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Places that cover a matrix in whole blocks, each with that of its scales."""
    rows, columns = weight.shape
    width = min(_COLUMNS, -(-columns // BLOCK) * BLOCK)
    height = max(1, _AT_ONCE // (width * BLOCK)) * BLOCK
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            corner = (row, height), (column, width)
            first, second = (slice(start, start + size) for start, size in corner)
            above, left = (slice(start // BLOCK, (start + size) // BLOCK) for start, size in corner)
            yield (first, second), (above, left)


def _check_largest(name: str, largest: torch.Tensor) -> None:
    """Reject magnitudes that are not finite, or become infinite in bfloat16 when they are dequantised."""
    wrong = ~(_scale(largest) * _LARGEST).bfloat16().isfinite()
    if wrong.any():
        raise VLBridgeError(
            f"{name}: expected finite values up to {torch.finfo(torch.bfloat16).max:g}, which FP8 with scales holds, "
            f"found {largest[wrong][0].item():g}. Export without FP8, or use weights from before they diverged."
        )
