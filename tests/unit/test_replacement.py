"""Failed conversations are replaced by ones that fit, the same everywhere, and not more than allowed."""

import logging

import numpy as np
import pytest

from megatron_vlbridge.data.packing.replacement import ATTEMPTS, Replacements
from megatron_vlbridge.errors import VLBridgeError
from tests.errors import rejects

RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(5, 100, 200).tolist()
PATCHES = RANDOM.integers(0, 4, 200).tolist()


def replacements(seed: int = 3, max_share: float = 0.1) -> Replacements:
    return Replacements(LENGTHS, PATCHES, seed=seed, max_share=max_share)


def test_a_replacement_is_another_conversation_that_is_not_larger() -> None:
    found = {member: list(replacements().candidates(7, member)) for member in range(200)}
    for member, candidates in found.items():
        assert all(LENGTHS[one] <= LENGTHS[member] and PATCHES[one] <= PATCHES[member] for one in candidates)
        assert member not in candidates
        fitting = [
            n for n in range(200) if n != member and LENGTHS[n] <= LENGTHS[member] and PATCHES[n] <= PATCHES[member]
        ]
        assert set(candidates) <= set(fitting)
        assert bool(candidates) or len(fitting) < 3
    # Among equals, which one is by chance.
    assert len({candidates[0] for candidates in found.values() if candidates}) > 60


def test_of_equal_conversations_each_is_drawn() -> None:
    equal = Replacements([8] * 10, [1] * 10, seed=0, max_share=0.1)
    assert {next(equal.candidates(pack, 4)) for pack in range(200)} == set(range(10)) - {4}
    assert len(list(equal.candidates(0, 4))) <= ATTEMPTS


def test_it_depends_on_seed_pack_and_conversation_alone() -> None:
    other = replacements()
    other.note_read()
    other.note_failure(5, VLBridgeError("broken"))
    places = [(pack, member) for pack in (0, 1, 9) for member in (3, 4)]
    drawn = [list(replacements().candidates(*place)) for place in places]
    assert [list(other.candidates(*place)) for place in places] == drawn
    assert len({tuple(one) for one in drawn}) == len(places)
    assert list(replacements(seed=4).candidates(0, 3)) != drawn[0]


def test_without_a_share_the_error_itself_is_raised() -> None:
    error = VLBridgeError("train.jsonl, line 7: image: no file 'a.png'")
    with pytest.raises(VLBridgeError) as caught:
        replacements(max_share=0).note_failure(3, error)
    assert caught.value is error


def test_more_failures_than_the_share_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Of the conversations that were read, or of all where these are few. Each is counted and logged once."""
    some = replacements(max_share=0.01)
    with caplog.at_level(logging.WARNING):
        for member in (0, 1, 1, 0):
            some.note_read()
            some.note_failure(member, VLBridgeError(f"line {member}: broken"))
        with rejects("3 conversations", "has read 4", "--max-bad-samples 0.01 of 200", "the last: line 2: broken"):
            some.note_failure(2, VLBridgeError("line 2: broken"))
        for _ in range(296):
            some.note_read()
        some.note_failure(2, VLBridgeError("line 2: broken"))
        with rejects("4 conversations", "of 300"):
            some.note_failure(3, VLBridgeError("line 3: broken"))
    assert [record.getMessage() for record in caplog.records] == [f"replaced: line {n}: broken" for n in range(4)]


def test_many_conversations_are_judged_by_a_thousand() -> None:
    many = Replacements([5] * 5000, [0] * 5000, seed=0, max_share=0.002)
    many.note_failure(0, VLBridgeError("line 0: broken"))
    many.note_failure(1, VLBridgeError("line 1: broken"))
    with rejects("of 1000"):
        many.note_failure(2, VLBridgeError("line 2: broken"))


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_is_below_one(share: float) -> None:
    with rejects("max_bad_samples"):
        replacements(max_share=share)
