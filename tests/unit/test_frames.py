"""Frames: coordinates, lengths and table weights equal transformers' and those of plain loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from megatron_vlbridge.layout.frames import Frames, grids_of
from tests.closeness import assert_close_in_norm

CPU = torch.device("cpu")


@st.composite
def frames(draw):
    merge = draw(st.integers(1, 3))
    size = st.integers(1, 4).map(lambda blocks: blocks * merge)
    return Frames(tuple(draw(st.lists(st.tuples(st.integers(1, 3), size, size), min_size=1, max_size=4))), merge)


def patches_in_order(frames: Frames) -> list[tuple[int, int, int, int]]:
    """Row, column, height and width of each patch, by walking images, frames, merge blocks and their corners."""
    merge = frames.merge_size
    return [
        (block_row + row, block_column + column, height, width)
        for count, height, width in frames.grids
        for _ in range(count)
        for block_row in range(0, height, merge)
        for block_column in range(0, width, merge)
        for row in range(merge)
        for column in range(merge)
    ]


@given(frames())
def test_coordinates_equal_loops_and_transformers(frames):
    found = frames.coordinates(CPU)
    assert found.T.tolist() == [[row, column] for row, column, _, _ in patches_in_order(frames)]
    assert torch.equal(found.T, get_vision_position_ids(torch.tensor(frames.grids), frames.merge_size))


@given(frames())
def test_lengths_equal_the_segments_of_transformers(frames):
    assert frames.lengths == tuple(get_vision_cu_seqlens(torch.tensor(frames.grids)).diff().tolist())
    assert sum(frames.lengths) == frames.patches == len(patches_in_order(frames))


@given(frames(), st.integers(1, 9))
def test_table_weights_equal_transformers(frames, side):
    index, weight = frames.table_weights(side, CPU)
    their_index, their_weight = get_vision_interpolation_indices_and_weights(
        torch.tensor(frames.grids), side, "bilinear", align_corners=True, spatial_merge_size=frames.merge_size
    )
    assert torch.equal(index, their_index.T)
    assert_close_in_norm(weight, their_weight.T, 1e-6)


@given(frames(), st.integers(2, 9))
def test_table_weights_interpolate_a_linear_table_exactly(frames, side):
    """Of the table row -> a, column -> b the interpolation must give the patch's own place in the table."""
    index, weight = frames.table_weights(side, CPU)
    assert_close_in_norm(weight.sum(0), torch.ones(frames.patches), 1e-6)
    assert (weight >= 0).all()
    table = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    found = (table[index] * weight[..., None]).sum(0)
    expected = [
        (row * (side - 1) / max(height - 1, 1), column * (side - 1) / max(width - 1, 1))
        for row, column, height, width in patches_in_order(frames)
    ]
    assert_close_in_norm(found, expected, 1e-6)


def test_corners_of_an_image_are_corners_of_the_table():
    index, weight = Frames(((1, 4, 6),)).table_weights(5, CPU)
    chosen = [{int(i) for i, w in zip(index[:, p], weight[:, p], strict=True) if w > 0} for p in (0, 9, 14, 23)]
    # First patch; last of the first row of blocks' upper rows; first of the last row; last patch.
    assert chosen[0] == {0}
    assert chosen[1] == {4}
    assert chosen[2] == {20}
    assert chosen[3] == {24}


def test_grids_of_a_tensor_and_of_lists():
    assert grids_of(torch.tensor([[1, 4, 6], [2, 2, 2]])) == ((1, 4, 6), (2, 2, 2))
    assert grids_of([[1, 4, 6]]) == ((1, 4, 6),)
    assert grids_of(torch.zeros(0, 3, dtype=torch.int64)) == ()


def test_no_number_is_asked_of_the_device():
    """A meta tensor has no numbers to give."""
    frames, device = Frames(((1, 4, 6), (2, 2, 2))), torch.device("meta")
    assert frames.coordinates(device).shape == (2, 32)
    assert frames.table_weights(6, device)[1].shape == (4, 32)
