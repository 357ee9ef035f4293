"""What an MTP layer is given: next tokens and labels inside segments, the same over context-parallel ranks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlbridge.layout.batch_layout import BatchLayout, gather
from megatron_vlbridge.layout.zigzag import zigzag_index
from megatron_vlbridge.model.inputs.mtp import MtpInputs, next_in_segment
from tests.closeness import assert_close_in_norm

IGNORED = -100


@st.composite
def packs(draw) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens, labels, true lengths; after the segments there is padding."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    padding = draw(st.integers(0, 4))
    total = sum(lengths) + padding
    tokens = torch.arange(1, total + 1)[None]
    supervised = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    labels = torch.where(torch.tensor([supervised]), tokens + 1, IGNORED)
    labels[:, sum(lengths) :] = IGNORED
    return tokens, labels, lengths


def by_hand(row: list[int], lengths: list[int], fill: int) -> list[int]:
    """Token by token, without any arithmetic on the whole row."""
    result, start = [], 0
    for length in lengths:
        segment = row[start : start + length]
        result += [*segment[1:], fill]
        start += length
    return result + [fill] * (len(row) - start)


@settings(max_examples=200, deadline=None)
@given(packs())
def test_rolls_stay_inside_segments(pack):
    tokens, labels, lengths = pack
    found = MtpInputs.from_pack(tokens, labels, lengths, 0, IGNORED)
    assert found.tokens[0].tolist() == by_hand(tokens[0].tolist(), lengths, 0)
    mtp = by_hand(labels[0].tolist(), lengths, IGNORED)
    assert found.labels[0].tolist() == [max(label, 0) if label != IGNORED else 0 for label in mtp]
    count = sum(label != IGNORED for label in mtp)
    assert found.supervised == count
    share = int((labels != IGNORED).sum()) / max(count, 1)
    assert_close_in_norm(found.weights[0], [share * (label != IGNORED) for label in mtp], 1e-6)
    without = MtpInputs.from_pack(tokens, None, lengths, 0, IGNORED)
    assert torch.equal(without.tokens, found.tokens)
    assert without.labels is None
    assert without.weights is None


@settings(max_examples=100, deadline=None)
@given(packs())
def test_the_weights_of_labels_follow_them(pack):
    tokens, labels, lengths = pack
    given = torch.arange(1.0, tokens.shape[1] + 1)[None]
    found = MtpInputs.from_pack(tokens, labels, lengths, 0, IGNORED, given)
    plain = MtpInputs.from_pack(tokens, labels, lengths, 0, IGNORED)
    expected = plain.weights[0] * torch.tensor(by_hand(given[0].tolist(), lengths, 0))
    assert torch.equal(found.weights[0], expected)
    assert found.supervised == plain.supervised


@settings(max_examples=100, deadline=None)
@given(packs(), st.sampled_from([2, 4]))
def test_a_part_of_the_rolled_pack_is_the_rolled_part(pack, cp):
    """Rolling the whole pack with its padded segments and cutting it gives what cutting the rolled pack gives."""
    tokens, _, lengths = pack
    padded = [-(-length // (2 * cp)) * 2 * cp for length in lengths]
    row = torch.zeros(1, sum(padded), dtype=torch.int64)
    starts = [sum(padded[:number]) for number in range(len(padded))]
    for start, part in zip(starts, tokens[0, : sum(lengths)].split(lengths), strict=True):
        row[0, start : start + len(part)] = part
    rolled = next_in_segment(row, padded, 0)
    dense = next_in_segment(tokens, lengths, 0)
    total = sum(padded)
    layout = BatchLayout.packed(lengths, max(total, tokens.shape[1]) + (-max(total, tokens.shape[1])) % (2 * cp))
    wide = torch.cat((dense, torch.zeros(1, layout.total - dense.shape[1], dtype=torch.int64)), dim=1)
    for rank in range(cp):
        mine = gather(wide, layout.context_parallel(cp, rank).gather_index, 0)
        expected = rolled[:, zigzag_index(tuple(padded), cp, rank)]
        assert torch.equal(mine[:, : expected.shape[1]], expected)
