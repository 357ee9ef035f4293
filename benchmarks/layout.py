"""A pack's layout with all its indices, and how evenly the tower's frames are partitioned.

    python benchmarks/layout.py

For a pack of 128k tokens in 200 segments, half of them image tokens, everything that tells where a token lives is built
with cold caches, on one thread, as in a data loader's worker: the layout, `gather_index`, a rank's zigzag index and
image tokens, the order of the gathered pack, `cu_seqlens`. Then frames are partitioned over ranks: the largest load
over the optimum, found by brute force, or for many frames over the mean, which no partition is below. Exit code 1 if a
pack takes 5 ms or more.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.backends.packed import PackedSegments
from megatron_vlbridge.layout.balance import frame_work, partition
from megatron_vlbridge.layout.batch_layout import BatchLayout, select
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.zigzag import pack_order, zigzag_index
from megatron_vlbridge.model.inputs import PackedInputs

TOKENS, SEGMENTS = 131_072, 200
LIMIT_MS = 5.0
ROUNDS = 31
CONFIG = Path(__file__).parents[1] / "tests" / "data" / "configs" / "Qwen3-VL-2B-Instruct.json"
# Frames and ranks of the random mixes; up to `SMALL` frames the optimum is found.
MIXES = ((8, 2), (8, 4), (12, 2), (12, 4), (16, 4), (16, 8), (40, 8), (64, 8), (256, 8))
SMALL = 16
DRAWS = 100


def make_lengths() -> list[int]:
    """From some 30 to 1300 tokens, leaving room for the padding of 8 context-parallel ranks."""
    draws = torch.rand(SEGMENTS, generator=torch.Generator().manual_seed(0)) * 1200 + 30
    return (draws / draws.sum() * (TOKENS - 16 * SEGMENTS)).long().tolist()


def indices(lengths: list[int], image_tokens: torch.Tensor, cp_size: int) -> None:
    """Everything by which the last rank gathers or finds its tokens."""
    layout = BatchLayout.packed(lengths, TOKENS).context_parallel(cp_size, cp_size - 1)
    select(image_tokens, layout.gather_index, TOKENS)
    order = None
    if cp_size > 1:
        zigzag_index(layout.segments, cp_size, cp_size - 1)
        order = pack_order(layout.segments, cp_size)
    PackedSegments.from_lengths(layout.segments, torch.device("cpu"), order)


def median_ms(call: Callable[[], object]) -> float:
    """Of the processor's time, which other programs on the machine do not lengthen."""
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
    image_tokens = torch.arange(0, sum(lengths), 2)
    pack = PackedInputs(
        layout=BatchLayout.packed(lengths, TOKENS),
        tokens=torch.zeros(1, TOKENS, dtype=torch.int64),
        position_ids=torch.zeros(3, 1, TOKENS, dtype=torch.int64),
        labels=torch.zeros(1, TOKENS, dtype=torch.int64),
        loss_mask=torch.ones(1, TOKENS),
        vision_token_index=image_tokens,
        frames=Frames(()),
        patches=torch.empty(0, config.vision.patch_dim),
    )
    print(f"{TOKENS} tokens, {SEGMENTS} segments; median of {ROUNDS}, cold caches, one thread; limit {LIMIT_MS} ms")
    good = True
    for cp_size in (1, 2, 4, 8):
        built = median_ms(lambda size=cp_size: indices(lengths, image_tokens, size))
        cut = median_ms(lambda size=cp_size: pack.context_parallel(size, size - 1, config))
        good &= built < LIMIT_MS
        print(f"CP={cp_size}   all indices {built:.2f} ms, {built / LIMIT_MS:.2f} of the limit", end="   ")
        print(f"the pack's tensors gathered by them {cut:.2f} ms")
    return good


def make_mix(generator: random.Random, frames: int) -> list[int]:
    """Patches of images of all shapes and of videos, whose frames are alike."""
    patches: list[int] = []
    while len(patches) < frames:
        alike = generator.choice((1, 1, generator.randint(2, 8)))
        patches += [4 * generator.randint(2, 32) * generator.randint(2, 32)] * alike
    return patches[:frames]


def is_possible(work: list[int], ranks: int, limit: int) -> bool:
    """Whether a partition has no load above `limit`; goes through all, those of equal loads once."""
    found = {(0,) * ranks}
    for size in sorted(work, reverse=True):
        found = {
            tuple(sorted((*loads[:rank], loads[rank] + size, *loads[rank + 1 :])))
            for loads in found
            for rank in range(ranks)
            if loads[rank] + size <= limit
        }
    return bool(found)


def optimum(work: list[int], ranks: int, high: int) -> int:
    """The smallest largest load of any partition, which is at most `high`; by bisection."""
    low = max(-(-sum(work) // ranks), *work)
    while low < high:
        middle = (low + high) // 2
        if is_possible(work, ranks, middle):
            high = middle
        else:
            low = middle + 1
    return low


def measure_balance(hidden_size: int = 1024) -> None:
    print(f"\nRandom mixes of images and videos, {DRAWS} each: the largest load, median and worst")
    generator = random.Random(0)
    for frames, ranks in MIXES:
        ratios, times = [], []
        for _ in range(DRAWS):
            work = [frame_work(patches, hidden_size) for patches in make_mix(generator, frames)]
            begin = time.process_time()
            shares = partition(work, ranks)
            times.append((time.process_time() - begin) * 1e3)
            load = max(sum(work[frame] for frame in share) for share in shares)
            ratios.append(load / (optimum(work, ranks, load) if frames <= SMALL else sum(work) / ranks))
        below = sum(ratio < 1.05 for ratio in ratios)
        print(f"{frames:3} frames, {ranks} ranks   {statistics.median(ratios):.4f} {max(ratios):.4f}", end=" ")
        print("of the optimum" if frames <= SMALL else "of the mean   ", end="   ")
        print(f"{below} of {DRAWS} within 5 %   {statistics.median(times):.3f} ms")


def main() -> int:
    torch.set_num_threads(1)
    fast = measure_layouts()
    measure_balance()
    return 0 if fast else 1


if __name__ == "__main__":
    sys.exit(main())
