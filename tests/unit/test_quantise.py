"""Weights turned into FP8 with block scales, against a brute-force search among all float8_e4m3fn values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlbridge.checkpoint.hf.quantise import check_quantisable, quantise, quantised_output, weight_region
from megatron_vlbridge.checkpoint.stream.parts import row_blocks
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, TensorSpec
from tests.fp8_checkpoint import blocks, quantise_in_fp32

NAME = "model.language_model.layers.0.mlp.down_proj.weight"
SMALLEST = 2.0**-126
CODES = torch.arange(256, dtype=torch.uint8)
VALUES = CODES.view(torch.float8_e4m3fn).float()


def unused(region: Region, out: torch.Tensor) -> None:
    """A filler that is not to be called."""
    raise AssertionError(region)


def nearest(scaled: torch.Tensor) -> torch.Tensor:
    """Of each value, the nearest that float8_e4m3fn has; of two, the one with an even code."""
    finite = VALUES.isfinite()
    codes, values = CODES[finite], VALUES[finite].double()
    distance = (scaled.double()[:, None] - values).abs() + (codes % 2) * 1e-12
    return values[distance.argmin(1)].float()


def random_matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Blocks of very different sizes, one of zeros."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    for number, (place, _) in enumerate(blocks(weight.shape)):
        weight[place[1:]] *= 10.0 ** (3 * (number % 5) - 6) if number % 7 else 0
    return weight.to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_values_and_scales_are_those_of_the_reference(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    weight = random_matrix(rows, columns, dtype, seed)
    before = weight.clone()
    values, scales = quantise(NAME, weight)
    expected_values, expected_scales = quantise_in_fp32(weight)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))
    assert torch.equal(weight, before)


def test_values_are_the_nearest_of_all_that_eight_bits_have() -> None:
    known = VALUES[VALUES.isfinite()].unique()
    row = torch.cat([known, (known[1:] + known[:-1]) / 2, torch.linspace(-448, 448, 900)])
    for part in row.split(127):
        weight = torch.cat([part, torch.tensor([448.0])])
        values, scales = quantise(NAME, weight[None])
        assert scales.item() == 1
        assert torch.equal(values[0].float(), nearest(weight))


def test_wide_and_tall_matrices_are_cut_in_whole_blocks() -> None:
    """Larger than what is quantised at once, in both directions."""
    for shape in ((260, 9000), (9000, 260)):
        weight = random_matrix(*shape, torch.bfloat16, 1)
        found, expected = quantise(NAME, weight), quantise_in_fp32(weight)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


def test_blocks_of_zeros_and_tiny_values_have_the_smallest_normal_scale() -> None:
    weight = torch.zeros(130, 256)
    weight[0, 128], weight[1, 128] = 1e-37, -3e-38
    values, scales = quantise(NAME, weight)
    assert torch.equal(scales, torch.full((2, 2), SMALLEST))
    assert values[0, 128].float() == nearest(torch.tensor([1e-37 / SMALLEST]))
    assert not values.float()[:, :128].any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.4e38])
def test_values_without_a_form_in_fp8_are_refused_by_name(value: float) -> None:
    weight = torch.ones(130, 10)
    weight[129, 3] = value
    for refuse in (quantise, check_quantisable):
        with pytest.raises(VLBridgeError, match=rf"{NAME}: expected finite values up to 3.38953e\+38.*Export without"):
            refuse(NAME, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_values_have_a_finite_form(dtype: torch.dtype) -> None:
    largest = torch.finfo(torch.bfloat16).max
    weight = torch.tensor([[largest, -largest / 3]], dtype=dtype)
    check_quantisable(NAME, weight)
    values, scales = quantise(NAME, weight)
    assert (values.float() * scales).bfloat16().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_that_are_not_read_back_beside_fp8_are_refused(dtype: torch.dtype) -> None:
    specs = {NAME: TensorSpec((4, 4), torch.bfloat16), "norm.weight": TensorSpec((4,), dtype)}
    with pytest.raises(VLBridgeError, match=r"norm.weight: expected float32 or bfloat16 .* Give dtype bfloat16"):
        quantised_output(specs, unused, ())
    assert quantised_output(specs, unused, ["norm.weight"])[0]["norm.weight"] == specs["norm.weight"]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**31))
def test_filled_by_blocks_it_is_the_quantised_whole(rows: int, columns: int, limit: int, seed: int) -> None:
    weight = random_matrix(rows, columns, torch.bfloat16, seed)
    plain = {NAME: TensorSpec(tuple(weight.shape), torch.bfloat16), "norm": TensorSpec((3,), torch.float32)}
    norm = torch.randn(3)
    read: list[Region] = []

    def fill(region: Region, out: torch.Tensor) -> None:
        read.append(region)
        out.copy_((weight if region.name == NAME else norm)[region.slices])

    (specs, quantising, reads), filled = quantised_output(plain, fill, ()), {}
    assert list(specs) == [NAME, f"{NAME}_scale_inv", "norm"]
    for name, spec in specs.items():
        filled[name] = torch.empty(spec.shape, dtype=spec.dtype)
        multiple = 128 if spec.dtype == torch.float8_e4m3fn else 1
        for block in row_blocks(Region.whole(name, spec.shape), 1, limit * 500, multiple=multiple):
            before = len(read)
            out = torch.empty(block.shape, dtype=spec.dtype)
            quantising(block, out)
            filled[name][block.slices] = out
            elements = block.volume if name == "norm" else weight_region(block, plain).volume
            assert sum(x.volume for x in read[before:]) == elements
            assert elements * 2 <= block.volume * reads.bytes_of_element.get(name, 4)
    values, scales = quantise(NAME, weight)
    assert torch.equal(filled[NAME].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(filled[f"{NAME}_scale_inv"], scales)
    assert torch.equal(filled["norm"], norm)


def test_a_block_larger_than_what_is_quantised_at_once_is_filled_in_strips() -> None:
    weight = random_matrix(9000, 260, torch.bfloat16, 2)
    plain = {NAME: TensorSpec(tuple(weight.shape), torch.bfloat16)}
    read: list[int] = []

    def fill(region: Region, out: torch.Tensor) -> None:
        read.append(region.volume)
        out.copy_(weight[region.slices])

    specs, quantising, reads = quantised_output(plain, fill, ())
    expected = dict(zip(specs, quantise(NAME, weight), strict=True))
    for name, spec in specs.items():
        out = torch.empty(spec.shape, dtype=spec.dtype)
        quantising(Region.whole(name, spec.shape), out)
        assert torch.equal(out.view(torch.uint8), expected[name].view(torch.uint8))
    assert len(read) == 6
    assert max(read) * 2 < reads.scratch_bytes
