"""BatchLayout: a padded table becomes a pack and back, as a loop over its cells says; invalid batches are rejected."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout

FILL = -7


@st.composite
def masks(draw):
    """[B, S] of 0 and 1 with at least one token in each row: padding on the left, the right, or anywhere."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    table = []
    for _ in range(rows):
        side = draw(st.sampled_from(["left", "right", "anywhere"]))
        if side == "anywhere":
            row = draw(st.lists(st.integers(0, 1), min_size=columns, max_size=columns).filter(any))
        else:
            kept = draw(st.integers(1, columns))
            row = [1] * kept + [0] * (columns - kept) if side == "right" else [0] * (columns - kept) + [1] * kept
        table.append(row)
    return torch.tensor(table)


@given(masks(), st.integers(1, 4))
def test_pack_equals_a_loop_over_the_table(mask, multiple_of):
    table = torch.arange(100, 100 + mask.numel()).view(mask.shape)
    layout = BatchLayout.from_padded(mask, multiple_of)
    kept = [
        [int(table[b, s]) for s in range(mask.shape[1]) if mask[b, s] == 1]  # in the order of the row
        for b in range(mask.shape[0])
    ]
    tokens = [token for row in kept for token in row]
    assert layout.lengths == tuple(len(row) for row in kept)
    assert layout.total % multiple_of == 0
    assert len(tokens) <= layout.total < len(tokens) + multiple_of
    assert layout.pack(table, FILL).tolist() == [tokens + [FILL] * (layout.total - len(tokens))]
    assert sum(layout.segments) == layout.total
    assert layout.segments[: len(kept)] == layout.lengths
    assert layout.padding == layout.total - len(tokens)


@given(masks(), st.integers(1, 4), st.sampled_from([(), (3,), (2, 2)]))
def test_unpack_puts_every_token_back_and_zeros_elsewhere(mask, multiple_of, tail):
    layout = BatchLayout.from_padded(mask, multiple_of)
    packed = torch.randn(1, layout.total, *tail)
    table = layout.unpack(packed)
    assert table.shape == (*mask.shape, *tail)
    place = 0
    for b in range(mask.shape[0]):
        for s in range(mask.shape[1]):
            if mask[b, s]:
                assert torch.equal(table[b, s], packed[0, place])
                place += 1
            else:
                assert not table[b, s].any()


def test_unpack_gives_the_gradient_of_kept_tokens_alone():
    layout = BatchLayout.from_padded(torch.tensor([[1, 1, 0], [0, 1, 0]]), multiple_of=4)
    packed = torch.randn(1, 4, 2, requires_grad=True)
    layout.unpack(packed).sum().backward()
    assert packed.grad[0].tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


def test_bool_mask_is_a_mask():
    mask = torch.tensor([[True, False], [True, True]])
    assert BatchLayout.from_padded(mask) == BatchLayout.from_padded(mask.long())


def test_packed_layout_names_the_padding_as_a_segment():
    assert BatchLayout.packed([3, 2], total=8).segments == (3, 2, 3)
    assert BatchLayout.packed([3, 2], total=5).segments == (3, 2)


@pytest.mark.parametrize(
    ("lengths", "total", "message"),
    [
        ([3, 0], 8, "segment 1 of the pack has length 0"),
        ([-1, 2], 8, "segment 0 of the pack has length -1"),
        ([], 8, "0 segments of together 0 tokens"),
        ([5, 4], 8, r"2 segments of together 9 tokens do not fit a pack of 8 tokens; lengths: \[5, 4\]"),
    ],
)
def test_invalid_lengths_are_rejected(lengths, total, message):
    with pytest.raises(VLBridgeError, match=message):
        BatchLayout.packed(lengths, total)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4), r"\[B, S\].*found shape \(4,\)"),
        (torch.ones(1, 1, 4, 4), r"\[B, S\].*found shape \(1, 1, 4, 4\)"),
        (torch.tensor([[0.0, -10000.0]]), "1 for a token and 0 for padding"),
        (torch.tensor([[1, 2]]), "1 for a token and 0 for padding"),
        (torch.tensor([[1, 1], [0, 0]]), "segment 1 of the pack has length 0"),
    ],
)
def test_invalid_masks_are_rejected(mask, message):
    with pytest.raises(VLBridgeError, match=message):
        BatchLayout.from_padded(mask)


def test_a_table_of_another_shape_is_rejected():
    layout = BatchLayout.from_padded(torch.ones(2, 3))
    with pytest.raises(VLBridgeError, match=r"shape \(2, 3\), found \(3, 2\)"):
        layout.pack(torch.zeros(3, 2), 0)


def test_a_pack_has_no_table():
    layout = BatchLayout.packed([3], total=4)
    with pytest.raises(VLBridgeError, match="found"):
        layout.pack(torch.zeros(1, 4), 0)
    with pytest.raises(VLBridgeError, match="came as a pack"):
        layout.unpack(torch.zeros(1, 4))


def places_of_ranks(lengths: list[int], total: int, cp_size: int) -> list[list[int]]:
    """The places in the pack of each rank's tokens, by cutting every padded segment in 2 * cp_size chunks; slow."""
    ranks: list[list[int]] = [[] for _ in range(cp_size)]
    for number, length in enumerate(lengths):
        start, chunk = sum(lengths[:number]), -(-length // (2 * cp_size))
        segment = [start + place if place < length else -1 for place in range(2 * cp_size * chunk)]
        for rank in range(cp_size):
            for piece in (rank, 2 * cp_size - 1 - rank):
                ranks[rank] += segment[piece * chunk : (piece + 1) * chunk]
    return [rank + [-1] * (total // cp_size - len(rank)) for rank in ranks]


@pytest.mark.parametrize(
    ("lengths", "total", "cp_size"), [([5, 1, 9], 24, 2), ([4, 4], 8, 2), ([1], 8, 4), ([7, 13, 2], 40, 4)]
)
def test_sources_equal_a_cut_chunk_by_chunk(lengths, total, cp_size):
    layout = BatchLayout.packed(lengths, total)
    parts = [layout.context_parallel(cp_size, rank).gather_index.tolist() for rank in range(cp_size)]
    assert parts == places_of_ranks(lengths, total, cp_size)


@pytest.mark.parametrize(
    ("lengths", "total", "message"),
    [([5, 2], 8, "together 12 tokens, but the pack has 8 tokens"), ([4], 10, "a multiple of 4")],
)
def test_a_pack_without_room_for_its_padding_is_rejected(lengths, total, message):
    layout = BatchLayout.packed(lengths, total)
    with pytest.raises(VLBridgeError, match=message):
        layout.context_parallel(2, 0)
