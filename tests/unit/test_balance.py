"""Sharing out frames: every frame once, and no way of sharing out whole frames has a smaller largest load."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionBlock

from megatron_vlbridge.layout.balance import frame_work, least_load, share_out


def largest_load(work: list[int], shares: tuple[tuple[int, ...], ...]) -> int:
    return max(sum(work[number] for number in share) for share in shares)


def some_way_has(work: list[int], ranks: int, limit: int) -> bool:
    """Whether any way has no load above `limit`: goes through all; ranks are alike, so ways of equal loads are one."""
    ways = {(0,) * ranks}
    for size in sorted(work, reverse=True):
        ways = {
            tuple(sorted((*way[:rank], way[rank] + size, *way[rank + 1 :])))
            for way in ways
            for rank in range(ranks)
            if way[rank] + size <= limit
        }
    return bool(ways)


def mix(seed: int, frames: int) -> list[int]:
    """The work of pictures of all shapes and of videos, whose frames are alike."""
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


# Shared out by patches the large frame would keep two small ones, by attention alone none.
LARGE_AND_SMALL = [64, *[24] * 6]


def test_linears_and_attention_both_count() -> None:
    work = [frame_work(patches, 8) for patches in LARGE_AND_SMALL]
    assert sorted(len(share) for share in share_out(work, 2)) == [2, 5]
    for other, sizes in ((LARGE_AND_SMALL, [3, 4]), ([patches**2 for patches in LARGE_AND_SMALL], [1, 6])):
        assert sorted(len(share) for share in share_out(other, 2)) == sizes


@given(st.lists(st.integers(1, 5000), max_size=300), st.integers(1, 8))
def test_every_item_is_shared_out_once(work: list[int], ranks: int) -> None:
    shares = share_out(work, ranks)
    assert len(shares) == ranks
    assert sorted(number for share in shares for number in share) == list(range(len(work)))


@given(st.lists(st.integers(1, 5000) | st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 4))
def test_few_items_reach_the_optimum(work: list[int], ranks: int) -> None:
    assert not some_way_has(work, ranks, largest_load(work, share_out(work, ranks)) - 1)


SIZES = [(8, 3), (8, 4), (12, 2), (12, 4), (12, 8), (16, 4), (16, 8), (20, 4), (20, 8), (24, 8)]


@pytest.mark.parametrize(("frames", "ranks"), SIZES)
def test_up_to_24_frames_reach_the_optimum(frames: int, ranks: int) -> None:
    for seed in range(20):
        work = mix(seed, frames)
        assert not some_way_has(work, ranks, largest_load(work, share_out(work, ranks)) - 1)


@pytest.mark.parametrize(("frames", "ranks"), [(40, 4), (64, 8), (200, 8), (256, 8)])
def test_many_frames_are_level(frames: int, ranks: int) -> None:
    for seed in range(10):
        work = mix(seed, frames)
        assert largest_load(work, share_out(work, ranks)) <= least_load(work, ranks) * 1.01


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 4))
def test_no_way_is_below_the_bound(work: list[int], ranks: int) -> None:
    assert not some_way_has(work, ranks, least_load(work, ranks) - 1)


def test_alike_frames_one_more_than_the_ranks_hold() -> None:
    assert least_load([7] * 9, 4) == 21
    assert largest_load([7] * 9, share_out([7] * 9, 4)) == 21


def test_one_large_picture_and_three_small_ones() -> None:
    work = [frame_work(patches, 1024) for patches in (64, 4096, 64, 64)]
    assert share_out(work, 2) == ((1,), (0, 2, 3))
    assert share_out(work, 4) == ((1,), (0,), (2,), (3,))
