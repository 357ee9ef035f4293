import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.layout.zigzag import pack_order, zigzag_index


def slow_zigzag(segments: list[int], size: int, rank: int) -> list[int]:
    """Token by token: cut each segment in 2 * size chunks, keep the rank's two."""
    places, start = [], 0
    for length in segments:
        for token in range(length):
            chunk = token * 2 * size // length
            if chunk in (rank, 2 * size - 1 - rank):
                places.append(start + token)
        start += length
    return places


sizes = st.integers(1, 8)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), sizes)
def test_index_equals_the_slow_one_and_ranks_share_out_the_pack(chunks: list[int], size: int) -> None:
    segments = tuple(2 * size * chunk for chunk in chunks)
    indices = [zigzag_index(segments, size, rank) for rank in range(size)]
    assert [index.tolist() for index in indices] == [slow_zigzag(list(segments), size, rank) for rank in range(size)]
    tokens = torch.randn(sum(segments))
    gathered = torch.cat([tokens[index] for index in indices])
    assert torch.equal(gathered[pack_order(segments, size)], tokens)


def slow_gather_index(lengths: list[int], total: int, size: int, rank: int) -> list[int]:
    """Write the pack down token by token, padding as -1, and pick what the rank holds."""
    step, row, segments = 2 * size, [], []
    for length in lengths:
        segments.append(-(-length // step) * step)
        row += [*range(sum(lengths[: len(segments) - 1]), sum(lengths[: len(segments)]))]
        row += [-1] * (segments[-1] - length)
    segments.append(total - len(row))
    row += [-1] * segments[-1]
    return [row[place] for place in slow_zigzag(segments, size, rank)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(2, 8), st.integers(0, 3))
def test_sources_equal_the_slow_ones_and_every_token_is_on_one_rank(lengths: list[int], size: int, spare: int) -> None:
    step = 2 * size
    total = sum(-(-length // step) * step for length in lengths) + spare * step
    layout = BatchLayout.packed(lengths, total)
    parts = [layout.context_parallel(size, rank).gather_index for rank in range(size)]
    assert [part.tolist() for part in parts] == [slow_gather_index(lengths, total, size, r) for r in range(size)]
    held = torch.cat(parts)
    assert sorted(held[held >= 0].tolist()) == list(range(sum(lengths)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 9))
def test_without_context_parallelism_the_pack_stays_as_it_is(lengths: list[int], spare: int) -> None:
    layout = BatchLayout.packed(lengths, sum(lengths) + spare)
    assert layout.gather_index.tolist() == [*range(sum(lengths)), *[-1] * spare]


def test_a_pack_without_room_for_the_padding_is_rejected() -> None:
    layout = BatchLayout.packed([5, 6], 12)
    with pytest.raises(VLBridgeError, match="together 16 tokens, but the pack has 12"):
        layout.context_parallel(2, 0)


def test_a_pack_that_cannot_be_cut_is_rejected() -> None:
    with pytest.raises(VLBridgeError, match="a multiple of 8"):
        BatchLayout.packed([3], 20).context_parallel(4, 0)


def test_a_segment_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(VLBridgeError, match="segment 1 has 6 tokens"):
        zigzag_index((8, 6), 2, 0)
