"""Offline packing holds every sample once within all limits, is first fit decreasing, and is near the optimum."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlbridge.data.packing.offline import order_packs, pack_lengths
from tests.errors import rejects

type Pairs = list[tuple[int, int]]


@st.composite
def lengths_and_capacity(draw: st.DrawFn, most: int = 40) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, capacity), max_size=most)), capacity


@st.composite
def samples_with_patches(draw: st.DrawFn, most: int = 40) -> tuple[Pairs, int, int]:
    """Tokens and patches of each sample, many of them without patches, and both limits."""
    capacity, max_patches = draw(st.integers(1, 30)), draw(st.integers(1, 60))
    patches = st.one_of(st.just(0), st.integers(0, max_patches))
    return draw(st.lists(st.tuples(st.integers(1, capacity), patches), max_size=most)), capacity, max_patches


def packed(*arguments: Any, **options: Any) -> tuple[list[list[int]], list[int]]:
    packs, dropped = pack_lengths(*arguments, **options)
    return [members.tolist() for members in packs], dropped


def ordered(packs: list[list[int]], *arguments: Any, **options: Any) -> list[list[int]]:
    arrays = [np.array(members) for members in packs]
    return [members.tolist() for members in order_packs(arrays, *arguments, **options)]


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The lengths in each pack: every sample, the longest first, goes into the first pack with room for it."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        room = [members for members in packs if sum(members) + length <= capacity]
        if room:
            room[0].append(length)
        else:
            packs.append([length])
    return packs


def fewest_packs(samples: Pairs, capacity: int, max_patches: int) -> int:
    """By search over all sets of samples that fit into a pack together."""
    count = len(samples)

    def fits(chosen: int) -> bool:
        members = [samples[i] for i in range(count) if chosen >> i & 1]
        return sum(size for size, _ in members) <= capacity and sum(used for _, used in members) <= max_patches

    possible = [chosen for chosen in range(1, 1 << count) if fits(chosen)]

    @functools.cache
    def search(left: int) -> int:
        lowest = left & -left
        return min((1 + search(left & ~one) for one in possible if one & lowest and not one & ~left), default=0)

    return search((1 << count) - 1)


def holds_each_once(packs: list[list[int]], count: int) -> bool:
    return all(packs) and sorted(itertools.chain(*packs)) == list(range(count))


@given(lengths_and_capacity(), st.integers(0, 9))
def test_packs_are_those_of_first_fit_decreasing(case: tuple[list[int], int], seed: int) -> None:
    lengths, capacity = case
    packs, dropped = packed(lengths, capacity, seed=seed)
    assert dropped == []
    assert holds_each_once(packs, len(lengths))
    assert [[lengths[index] for index in members] for members in packs] == first_fit_decreasing(lengths, capacity)


@given(samples_with_patches(), st.integers(0, 9))
def test_no_limit_is_exceeded_with_patches(case: tuple[Pairs, int, int], seed: int) -> None:
    samples, capacity, max_patches = case
    lengths, patches = [size for size, _ in samples], [used for _, used in samples]
    packs, dropped = packed(lengths, capacity, patches=patches, max_patches=max_patches, seed=seed)
    assert dropped == []
    assert holds_each_once(packs, len(samples))
    for members in packs:
        assert sum(lengths[index] for index in members) <= capacity
        assert sum(patches[index] for index in members) <= max_patches


@given(samples_with_patches(most=16))
def test_a_pack_is_closed_only_when_no_later_sample_fits_in(case: tuple[Pairs, int, int]) -> None:
    samples, capacity, max_patches = case
    lengths, patches = [size for size, _ in samples], [used for _, used in samples]
    packs = packed(lengths, capacity, patches=patches, max_patches=max_patches)[0]
    for index, members in enumerate(packs):
        tokens = capacity - sum(lengths[member] for member in members)
        free = max_patches - sum(patches[member] for member in members)
        later = itertools.chain(*packs[index + 1 :])
        assert not any(lengths[one] <= tokens and patches[one] <= free for one in later)


@given(samples_with_patches(most=8))
def test_few_samples_need_at_most_one_pack_more_than_the_optimum(case: tuple[Pairs, int, int]) -> None:
    samples, capacity, max_patches = case
    lengths, patches = [size for size, _ in samples], [used for _, used in samples]
    tokens_alone = len(packed(lengths, capacity)[0])
    assert tokens_alone - fewest_packs([(size, 0) for size in lengths], capacity, 0) in (0, 1)
    both = len(packed(lengths, capacity, patches=patches, max_patches=max_patches)[0])
    assert both - fewest_packs(samples, capacity, max_patches) in (0, 1)


@given(lengths_and_capacity(), st.integers(1, 6))
def test_lengths_are_rounded_up_to_a_multiple(case: tuple[list[int], int], multiple: int) -> None:
    lengths, capacity = case
    packs, dropped = packed(lengths, capacity, multiple_of=multiple, too_long="drop")
    rounded = [-(-length // multiple) * multiple for length in lengths]
    assert dropped == [index for index, length in enumerate(rounded) if length > capacity]
    assert sorted([*dropped, *itertools.chain(*packs)]) == list(range(len(lengths)))
    kept = [length for length in rounded if length <= capacity]
    assert [[rounded[index] for index in members] for members in packs] == first_fit_decreasing(kept, capacity)


@given(lengths_and_capacity(), st.integers(1, 7), st.integers(0, 9))
def test_a_window_is_packed_by_itself(case: tuple[list[int], int], window: int, seed: int) -> None:
    lengths, capacity = case
    packs = packed(lengths, capacity, window=window, seed=seed)[0]
    assert holds_each_once(packs, len(lengths))
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rest = iter(packs)
    for start in range(0, len(order), window):
        part = order[start : start + window]
        expected = first_fit_decreasing([lengths[index] for index in part], capacity)
        found = [next(rest) for _ in expected]
        assert [[lengths[index] for index in members] for members in found] == expected
        assert sorted(itertools.chain(*found)) == sorted(part)
    assert next(rest, None) is None


def test_a_seed_gives_the_same_packs_and_another_one_others() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 300)
    patches = lengths // 2
    for options in ({}, {"window": 50}, {"patches": patches, "max_patches": 90}):
        first, again, other = (packed(lengths, 100, seed=seed, **options) for seed in (1, 1, 2))
        assert first == again
        assert first != other
    epochs = [packed(lengths, 100, seed=(1, epoch))[0] for epoch in range(2)]
    assert {frozenset(pack) for pack in epochs[0]} != {frozenset(pack) for pack in epochs[1]}


@pytest.mark.parametrize(
    ("capacity", "make"),
    [
        (8192, lambda random, n: random.lognormal(6.2, 1.0, n)),
        (8192, lambda random, n: random.integers(64, 4097, n)),
        (65_536, lambda random, n: random.lognormal(6.8, 1.1, n)),
        (8192, lambda random, n: np.where(random.random(n) < 0.5, 200, 1200) + random.normal(0, 60, n)),
    ],
)
def test_many_lengths_are_packed_close_to_the_bound(
    capacity: int, make: Callable[[np.random.Generator, int], np.ndarray]
) -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(make(random, 50_000), 16, capacity).astype(np.int64)
    packs = packed(lengths, capacity)[0]
    assert holds_each_once(packs, len(lengths))
    assert max(int(lengths[members].sum()) for members in packs) <= capacity
    assert len(packs) <= 1.001 * -(-lengths.sum() // capacity) + 1
    # Half of the samples have images, of 3.2 patches per token.
    patches = np.where(random.random(len(lengths)) < 0.5, (lengths * 3.2).astype(np.int64), 0)
    for max_patches in (2 * capacity, 4 * capacity):
        packs, dropped = packed(lengths, capacity, patches=patches, max_patches=max_patches, too_long="drop")
        kept = np.setdiff1d(np.arange(len(lengths)), dropped)
        bound = max(-(-lengths[kept].sum() // capacity), -(-patches[kept].sum() // max_patches))
        assert len(packs) <= 1.05 * bound
        assert max(int(patches[members].sum()) for members in packs) <= max_patches


def test_samples_that_exceed_a_limit_are_rejected_or_dropped() -> None:
    lengths, patches = [4, 11, 3, 5, 10], [0, 0, 30, 20, 20]
    with rejects("1 samples exceed", "10 tokens; the first is sample 1 with 11 tokens", "too_long='drop'"):
        packed(lengths, 10)
    with rejects("2 samples exceed", "10 tokens and 20 patches; the first is sample 1 with 11 tokens and 0 patches"):
        packed(lengths, 10, patches=patches, max_patches=20)
    assert packed(lengths, 10, too_long="drop")[1] == [1]
    packs, dropped = packed(lengths, 10, patches=patches, max_patches=20, too_long="drop")
    assert dropped == [1, 2]
    assert sorted(itertools.chain(*packs)) == [0, 3, 4]
    assert packed([11], 10, too_long="drop") == ([], [0])
    assert packed([], 10) == ([], [])
    assert packed([], 10, patches=[], max_patches=5) == ([], [])


def test_invalid_arguments_are_rejected_by_name() -> None:
    for length in (0, -1):
        with rejects("lengths: sample 1: expected at least 1", f"found {length}"):
            packed([3, length], 10)
    with rejects("lengths: expected integers, found float64"):
        packed([1.5], 10)
    with rejects("patches: sample 0: expected at least 0, found -1"):
        packed([3], 10, patches=[-1], max_patches=5)
    with rejects("patches: expected those of 1 samples, found 0"):
        packed([3], 10, max_patches=5)
    for name in ("window", "multiple_of"):
        with rejects(f"{name}: expected at least 1, found 0"):
            packed([3], 10, **{name: 0})
    with rejects("capacity: expected at least 1, found 0"):
        packed([3], 0)
    with rejects("work: sample 0: expected at least 0, found -1"):
        ordered([[0]], [-1])


# ---- the order of packs ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 3), max_size=40), st.integers(1, 5), st.integers(0, 9), st.data())
def test_neighbors_are_a_run_of_packs_of_like_work(
    sizes: list[int], neighbors: int, start: int, data: st.DataObject
) -> None:
    members = iter(range(sum(sizes)))
    packs = [[next(members) for _ in range(size)] for size in sizes]
    work = data.draw(st.lists(st.integers(0, 20), min_size=sum(sizes), max_size=sum(sizes)))
    found = ordered(packs, work, neighbors=neighbors, start=start, seed=3)
    assert sorted(found) == packs
    groups: dict[int, list[int]] = {}
    for place, pack in enumerate(found, start):
        groups.setdefault(place // neighbors, []).append(sum(work[member] for member in pack))
    runs = sorted(sorted(group) for group in groups.values())
    assert list(itertools.chain(*runs)) == sorted(itertools.chain(*runs))


def test_the_order_is_random_among_groups_within_them_and_among_packs_without_images() -> None:
    packs, work = [[index] for index in range(400)], [0] * 200 + list(range(1, 201))
    orders = [[pack for (pack,) in ordered(packs, work, neighbors=4, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    groups = [orders[0][place : place + 4] for place in range(0, 400, 4)]
    images = [group for group in groups if min(group) >= 200]
    assert len(images) == 50
    assert images != sorted(images)
    assert sum(group == sorted(group) for group in images) < 10
    blank = [group for group in groups if max(group) < 200]
    assert sum(max(group) - min(group) > 20 for group in blank) > 40
    alone = [pack for (pack,) in ordered(packs, work, seed=0)]
    assert np.corrcoef(alone, range(400))[0, 1] < 0.2
