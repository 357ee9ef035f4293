"""Partitioning frames: every frame once, and the largest load is near the smallest that any partition has."""

import random
from bisect import bisect_left

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionBlock

from megatron_vlbridge.layout.balance import frame_work, partition


def largest_load(work: list[int], shares: tuple[tuple[int, ...], ...]) -> int:
    return max(sum(work[item] for item in share) for share in shares)


def is_possible(work: list[int], ranks: int, limit: int) -> bool:
    """Whether a partition has no load above `limit`: goes through all; ranks are alike, so equal loads are one."""
    found = {(0,) * ranks}
    for size in sorted(work, reverse=True):
        found = {
            tuple(sorted((*loads[:rank], loads[rank] + size, *loads[rank + 1 :])))
            for loads in found
            for rank in range(ranks)
            if loads[rank] + size <= limit
        }
    return bool(found)


def optimum(work: list[int], ranks: int) -> int:
    """The smallest largest load of any partition, by bisection."""
    limits = range(-(-sum(work) // ranks), largest_load(work, partition(work, ranks)) + 1)
    return limits[bisect_left(limits, True, key=lambda limit: is_possible(work, ranks, limit))]


def slow_longest_first(work: list[int], ranks: int) -> list[int]:
    """The loads where the largest item that is left always goes to a rank with the smallest load."""
    loads = [0] * ranks
    for size in sorted(work, reverse=True):
        loads[loads.index(min(loads))] += size
    return sorted(loads)


def mix(seed: int, frames: int) -> list[int]:
    """The work of images of all shapes and of videos, whose frames are alike."""
    generator = random.Random(seed)
    patches: list[int] = []
    while len(patches) < frames:
        alike = generator.choice((1, 1, generator.randint(2, 8)))
        patches += [4 * generator.randint(2, 32) * generator.randint(2, 32)] * alike
    return [frame_work(n, 1024) for n in patches[:frames]]


@pytest.mark.parametrize(("patches", "hidden"), [(4, 32), (60, 32), (100, 16)])
def test_the_work_of_a_frame_is_that_of_a_block_of_transformers(patches: int, hidden: int) -> None:
    """Counted by torch: a multiply-add is two operations, and the work is in units of the hidden size."""
    config = Qwen3VLVisionConfig(hidden_size=hidden, intermediate_size=4 * hidden, num_heads=2)
    config._attn_implementation = "eager"
    angles = torch.zeros(patches, hidden // 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Qwen3VLVisionBlock(config)(
            torch.zeros(patches, hidden),
            cu_seqlens=torch.tensor([0, patches], dtype=torch.int32),
            position_embeddings=(angles.cos(), angles.sin()),
        )
    assert frame_work(patches, hidden) == counter.get_total_flops() // (2 * hidden)


# By patches the large frame's rank would get two small ones, by attention alone none.
LARGE_AND_SMALL = [64, *[24] * 6]


def test_linears_and_attention_both_count() -> None:
    work = [frame_work(patches, 8) for patches in LARGE_AND_SMALL]
    assert sorted(len(share) for share in partition(work, 2)) == [2, 5]
    for other, sizes in ((LARGE_AND_SMALL, [3, 4]), ([patches**2 for patches in LARGE_AND_SMALL], [1, 6])):
        assert sorted(len(share) for share in partition(other, 2)) == sizes


@given(st.lists(st.integers(1, 5000), max_size=300), st.integers(1, 8))
def test_every_item_is_on_one_rank(work: list[int], ranks: int) -> None:
    shares = partition(work, ranks)
    assert len(shares) == ranks
    assert sorted(item for share in shares for item in share) == list(range(len(work)))
    assert all(list(share) == sorted(share) for share in shares)


@given(st.lists(st.integers(1, 5000) | st.integers(1, 5), max_size=40), st.integers(1, 8))
def test_the_largest_item_goes_to_the_smallest_load(work: list[int], ranks: int) -> None:
    loads = sorted(sum(work[item] for item in share) for share in partition(work, ranks))
    assert loads == slow_longest_first(work, ranks)


@given(st.lists(st.integers(1, 5000) | st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 4))
def test_no_load_exceeds_grahams_bound(work: list[int], ranks: int) -> None:
    assert 3 * ranks * largest_load(work, partition(work, ranks)) <= (4 * ranks - 1) * optimum(work, ranks)


@pytest.mark.parametrize(("frames", "ranks"), [(8, 2), (8, 4), (12, 2), (12, 4)])
def test_mixes_are_near_the_optimum(frames: int, ranks: int) -> None:
    works = [mix(seed, frames) for seed in range(20)]
    ratios = [largest_load(work, partition(work, ranks)) / optimum(work, ranks) for work in works]
    assert sorted(ratios)[10] < 1.02
    assert max(ratios) < 1.17


@pytest.mark.parametrize(("frames", "ranks"), [(40, 4), (64, 8), (200, 8), (256, 8)])
def test_many_frames_are_near_the_mean(frames: int, ranks: int) -> None:
    works = [mix(seed, frames) for seed in range(10)]
    assert max(largest_load(work, partition(work, ranks)) * ranks / sum(work) for work in works) < 1.05


def test_one_large_image_and_three_small_ones() -> None:
    work = [frame_work(patches, 1024) for patches in (64, 4096, 64, 64)]
    assert partition(work, 2) == ((1,), (0, 2, 3))
    assert partition(work, 4) == ((1,), (0,), (2,), (3,))
