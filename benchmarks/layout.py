"""The time to build the layout and all indices of a pack, and the load balance of the vision tower's frames.

    python benchmarks/layout.py

For a pack of 128k tokens in 200 segments, half of them image tokens, all indices are built with cold caches, on one
thread, as in a data loader worker: the layout, its gather index, the zigzag and vision token indices of a rank, the
order of the gathered pack, `cu_seqlens`. Then frames are partitioned over ranks: the maximum load over the mean,
compared with the optimum or, where the optimum is not known, with a lower bound for whole frames. Exit code 1 if a pack
takes 5 ms or more, or a maximum load is above a known optimum.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.backends.packed import packed_segments
from megatron_vlbridge.layout.balance import frame_work, least_load, share_out
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.zigzag import pack_order, zigzag_index
from megatron_vlbridge.model.inputs import PackedInputs, taken_rows

TOKENS, SEGMENTS = 131_072, 200
LIMIT_MS = 5.0
ROUNDS = 31
CONFIG = Path(__file__).parents[1] / "tests" / "data" / "configs" / "Qwen3-VL-2B-Instruct.json"
FOUR_IMAGES = (4096, 64, 64, 64)
# Frames and ranks of the random mixes; up to `SMALL` frames, all partitions are searched.
MIXES = ((8, 2), (8, 4), (12, 4), (20, 4), (24, 8), (40, 8), (64, 8), (256, 8))
SMALL = 24
DRAWS = 20


def make_lengths() -> list[int]:
    """From about 30 to 1300 tokens, with space for the padding of 8 context-parallel ranks."""
    draws = torch.rand(SEGMENTS, generator=torch.Generator().manual_seed(0)) * 1200 + 30
    return (draws / draws.sum() * (TOKENS - 16 * SEGMENTS)).long().tolist()


def indices(lengths: list[int], vision_rows: torch.Tensor, cp_size: int) -> None:
    """Build all indices of the last rank."""
    layout = BatchLayout.packed(lengths, TOKENS).context_parallel(cp_size, cp_size - 1)
    taken_rows(vision_rows, layout.sources, TOKENS)
    order = None
    if cp_size > 1:
        zigzag_index(layout.segments, cp_size, cp_size - 1)
        order = pack_order(layout.segments, cp_size)
    packed_segments(layout.segments, torch.device("cpu"), order)


def median_ms(call: Callable[[], object]) -> float:
    """The median CPU time, which does not include other processes on the machine."""
    times = []
    for _ in range(ROUNDS):
        zigzag_index.cache_clear()
        pack_order.cache_clear()
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return statistics.median(times) * 1e3


def measure_layouts() -> bool:
    config, lengths = read_config(CONFIG), make_lengths()
    vision_rows = torch.arange(0, sum(lengths), 2)
    pack = PackedInputs(
        layout=BatchLayout.packed(lengths, TOKENS),
        tokens=torch.zeros(1, TOKENS, dtype=torch.int64),
        position_ids=torch.zeros(3, 1, TOKENS, dtype=torch.int64),
        labels=torch.zeros(1, TOKENS, dtype=torch.int64),
        loss_mask=torch.ones(1, TOKENS),
        vision_rows=vision_rows,
        frames=Frames(()),
        patches=torch.empty(0, config.vision.patch_dim),
    )
    print(f"{TOKENS} tokens, {SEGMENTS} segments; median of {ROUNDS}, cold caches, one thread; limit {LIMIT_MS} ms")
    good = True
    for cp_size in (1, 2, 4, 8):
        built = median_ms(lambda size=cp_size: indices(lengths, vision_rows, size))
        cut = median_ms(lambda size=cp_size: pack.context_parallel(size, size - 1, config))
        good &= built < LIMIT_MS
        print(f"CP={cp_size}   all indices {built:.2f} ms, {built / LIMIT_MS:.2f} of the limit", end="   ")
        print(f"sharding the pack's tensors {cut:.2f} ms")
    return good


def make_mix(generator: random.Random, frames: int) -> list[int]:
    """The numbers of patches of images of all shapes and of videos, whose frames have equal sizes."""
    patches: list[int] = []
    while len(patches) < frames:
        repeats = generator.choice((1, 1, generator.randint(2, 8)))
        patches += [4 * generator.randint(2, 32) * generator.randint(2, 32)] * repeats
    return patches[:frames]


def is_optimum(load: int, work: list[int], ranks: int) -> bool:
    """Whether no partition has a maximum load below `load`; partitions with the same loads are merged."""
    partitions = {(0,) * ranks}
    for size in sorted(work, reverse=True):
        partitions = {
            tuple(sorted((*loads[:rank], loads[rank] + size, *loads[rank + 1 :])))
            for loads in partitions
            for rank in range(ranks)
            if loads[rank] + size < load
        }
    return not partitions


def maximum_load(work: list[int], ranks: int) -> tuple[int, float]:
    """The maximum load of the partition, and the time to compute it in ms."""
    begin = time.process_time()
    shares = share_out(work, ranks)
    took = (time.process_time() - begin) * 1e3
    return max(sum(work[frame] for frame in frames) for frames in shares), took


def measure_balance(hidden_size: int = 1024) -> bool:
    good = True
    print("\nMaximum load over the mean: one image of 4096 patches and three of 64")
    work = [frame_work(patches, hidden_size) for patches in FOUR_IMAGES]
    for ranks in (2, 4):
        found, _ = maximum_load(work, ranks)
        optimal = is_optimum(found, work, ranks)
        good &= optimal
        print(f"{ranks} ranks   {found / (sum(work) / ranks):.4f}   the optimum: {optimal}")
    print(f"\nRandom mixes of images and videos, {DRAWS} each: maximum load over the mean, median and worst")
    generator = random.Random(0)
    for frames, ranks in MIXES:
        ratios, gaps, times, optimal_ones = [], [], [], 0
        for _ in range(DRAWS):
            work = [frame_work(patches, hidden_size) for patches in make_mix(generator, frames)]
            found, took = maximum_load(work, ranks)
            ratios.append(found / (sum(work) / ranks))
            gaps.append(found / least_load(work, ranks))
            times.append(took)
            optimal_ones += frames <= SMALL and is_optimum(found, work, ranks)
        good &= frames > SMALL or optimal_ones == DRAWS
        against = f"{max(gaps):.4f} of the lower bound" if frames > SMALL else f"optimum {optimal_ones} of {DRAWS}"
        print(f"{frames:3} frames, {ranks} ranks   {statistics.median(ratios):.4f} {max(ratios):.4f}", end="   ")
        print(f"{against:25}   {statistics.median(times):.2f} ms, slowest {max(times):.2f} ms")
    return good


def main() -> int:
    torch.set_num_threads(1)
    fast = measure_layouts()
    return 0 if measure_balance() and fast else 1


if __name__ == "__main__":
    sys.exit(main())
