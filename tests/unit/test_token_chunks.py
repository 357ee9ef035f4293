"""Where tokens lie in chunks, against loops over segments."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlbridge.backends.token_chunks import TokenChunks, pack_bounds, segments_of_tokens

# Also segments without tokens, as padding of cu_seqlens gives them.
PACKS = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any)


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


@given(PACKS)
def test_a_token_knows_its_segment_and_position(lengths: list[int]) -> None:
    segment, position = segments_of_tokens(bounds_of(lengths), sum(lengths))
    places = [(s, p) for s, length in enumerate(lengths) for p in range(length)]
    assert list(zip(segment.tolist(), position.tolist(), strict=True)) == places


@given(PACKS, st.integers(1, 9))
def test_each_segment_fills_chunks_of_its_own(lengths: list[int], size: int) -> None:
    chunks = TokenChunks.from_bounds(bounds_of(lengths), sum(lengths), size)
    slots: list[int | None] = []
    begins = []
    for start, length in zip(bounds_of(lengths).tolist(), lengths, strict=False):
        needed = -(-length // size)
        slots += [*range(start, start + length), *[None] * (needed * size - length)]
        begins += [chunk == 0 for chunk in range(needed)]
    found = [None if empty else token for token, empty in zip(chunks.token_of_slot, chunks.is_empty, strict=True)]
    assert found[: len(slots)] == slots
    assert found[len(slots) :] == [None] * (len(found) - len(slots))
    assert chunks.begins[: len(begins)].tolist() == begins
    assert chunks.begins[len(begins) : len(begins) + 1].all()
    assert chunks.slot_of_token.tolist() == [slot for slot, token in enumerate(slots) if token is not None]


@given(PACKS, st.integers(1, 9))
def test_the_number_of_chunks_is_the_least_that_any_lengths_need(lengths: list[int], size: int) -> None:
    chunks = TokenChunks.from_bounds(bounds_of(lengths), sum(lengths), size)
    tokens, segments = sum(lengths), len(lengths)
    # Most are needed by segments of one token, beside one of all others.
    worst = [1] * min(segments - 1, tokens - 1)
    needed = len(worst) + -(-(tokens - len(worst)) // size)
    assert needed <= len(chunks.begins) <= (tokens + (size - 1) * segments) // size


def test_split_and_join_are_inverse() -> None:
    chunks = TokenChunks.from_bounds(pack_bounds(None, 7, torch.device("cpu")), 7, 4)
    x = torch.arange(1.0, 1 + 2 * 7 * 3 * 2).view(2, 7, 3, 2)
    parts = chunks.split(x)
    assert parts.shape == (2, 6, 4, 2)
    assert torch.equal(parts[1, 4], torch.cat((x[1, 4:, 1], torch.zeros(1, 2))))
    assert torch.equal(chunks.join(parts, 2), x)
