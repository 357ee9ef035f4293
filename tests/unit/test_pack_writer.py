"""The memory of patches is used again, but never while a tensor has it."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlbridge.data.chat import Sample
from megatron_vlbridge.data.packing.pack_writer import PackWriter, next_of_segment
from megatron_vlbridge.data.packing.packs import build_pack
from megatron_vlbridge.data.packing.patch_memory import KEPT, PatchMemory


def sample(images: int, videos: int = 0, seed: int = 0, shape: tuple[int, ...] = (6,)) -> Sample:
    """A sample of two tokens and so many patches."""
    generator = torch.Generator().manual_seed(seed)
    patches = [torch.rand(count, *shape, generator=generator) for count in (images, videos)]
    grids = [torch.tensor([[1, 1, count]] if count else []).to(torch.int64).view(-1, 3) for count in (images, videos)]
    return Sample(torch.tensor([1, 2]), torch.tensor([False, True]), patches[0], grids[0], patches[1], grids[1])


def pack_of(samples: list[Sample], memory: PatchMemory, most: int = 40) -> dict[str, torch.Tensor]:
    writer = PackWriter(16, 0, most, memory)
    for one in samples:
        writer.add(one)
    return writer.tensors()


@pytest.mark.parametrize("shape", [(6,), (3, 2, 2)])
def test_patches_are_those_of_the_samples_in_order(shape: tuple[int, ...]) -> None:
    memory = PatchMemory()
    for counts in ([(3, 0), (0, 0), (5, 2)], [(0, 4), (0, 1)], [(0, 0)], [(7, 0), (0, 0)], [(20, 0), (0, 20)]):
        samples = [sample(*count, seed=seed, shape=shape) for seed, count in enumerate(counts)]
        most = sum(map(sum, counts))
        for pack in (pack_of(samples, memory, most), pack_of(samples, memory, most + 3), build_pack(samples, 16, 0)):
            for name in ("pixel_values", "pixel_values_videos"):
                expected = torch.cat([getattr(one, name) for one in samples])
                assert torch.equal(pack[name], expected)
                assert pack[name].dtype == torch.float32


def test_the_patches_of_one_sample_are_not_copied() -> None:
    samples = [sample(0), sample(5), sample(0)]
    for pack in (build_pack(samples, 16, 0), pack_of(samples, PatchMemory(), most=5)):
        assert pack["pixel_values"].data_ptr() == samples[1].pixel_values.data_ptr()


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda x: x,
    "rows": lambda x: x[2:4],
    "another shape": lambda x: x.view(-1)[12:24].view(2, 6),
    "an array": lambda x: x.numpy()[2:4],
    "a dtype": lambda x: x.view(torch.int32)[2:4],
    "detached": lambda x: x.detach()[2:4],
}


@pytest.mark.parametrize("name", VIEWS)
def test_memory_that_is_held_is_not_used_again(name: str) -> None:
    memory = PatchMemory()
    pack = pack_of([sample(3), sample(4, seed=1)], memory)
    place = pack["pixel_values"].data_ptr()
    held = VIEWS[name](pack.pop("pixel_values"))
    before = copy.deepcopy(held)
    for seed in range(2, 6):
        other = pack_of([sample(5, seed=seed), sample(6, seed=seed + 9)], memory)
        assert other["pixel_values"].data_ptr() != place
    assert (before == held).all()
    del held, other
    gc.collect()
    places = {pack_of([sample(3), sample(4)], memory)["pixel_values"].data_ptr() for _ in range(2 * KEPT)}
    assert places <= {x.ctypes.data for x in memory._free}
    assert place in places


def test_memory_is_used_again_and_little_of_it_is_kept() -> None:
    memory = PatchMemory()
    samples = [sample(3), sample(4)]
    assert len({pack_of(samples, memory)["pixel_values"].data_ptr() for _ in range(9)}) == 1
    packs = [pack_of(samples, memory) for _ in range(KEPT + 3)]
    assert len({pack["pixel_values"].data_ptr() for pack in packs}) == KEPT + 3
    del packs
    gc.collect()
    assert len(memory._free) == KEPT


def test_too_little_memory_is_replaced() -> None:
    memory = PatchMemory()
    pack_of([sample(3), sample(4)], memory, most=7)
    large = pack_of([sample(30), sample(40)], memory, most=70)
    assert torch.equal(large["pixel_values"], torch.cat([sample(30).pixel_values, sample(40).pixel_values]))


def test_a_small_pack_has_no_large_memory() -> None:
    memory, small, large = PatchMemory(), [sample(1), sample(2)], [sample(30), sample(40)]

    def place(samples: list[Sample], most: int) -> int:
        return pack_of(samples, memory, most)["pixel_values"].data_ptr()

    first = place(large, 70)
    assert place(small, 3) != first
    assert place(large, 70) == first
    assert place(small, 34) != first
    assert place([sample(30), sample(5)], 35) == first
    held = [pack_of(large, memory, 70) for _ in range(KEPT)]
    del held
    # The large pieces make room for what is used now.
    pack_of(small, memory, 3)
    assert place(small, 3) == place(small, 3)


def test_a_tensor_has_no_storage_but_its_own() -> None:
    """What is sent to another process is the storage."""
    pack = pack_of([sample(3), sample(4, 2)], PatchMemory(), most=1000)
    for name, count in (("pixel_values", 7), ("pixel_values_videos", 2)):
        assert pack[name].untyped_storage().nbytes() == count * 6 * 4


def test_another_process_has_its_own_memory() -> None:
    memory = PatchMemory()
    pack_of([sample(3), sample(4)], memory)
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert memory._free
        assert not other._free


def test_the_next_of_a_segment_is_never_of_another() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 5, int(random.integers(1, 6))).tolist()
        values = random.integers(0, 99, sum(lengths) + int(random.integers(0, 4)))
        expected, start = [], 0
        for length in lengths:
            expected += [*values[start + 1 : start + length], -1]
            start += length
        found = next_of_segment(values, lengths, -1)
        assert found[:start].tolist() == expected
        assert found[-1] == -1
