"""Offline packing of 1,000,000 lengths: time on one core, and packs compared with the lower bound.

    python benchmarks/data.py

The bound is the sum of the tokens over the capacity, or that of the patches over their limit, whichever is larger; no
packing is below it. Exit code 1 if tokens alone take 0.5 s or more or need 0.1 % more packs than the bound, or with a
limit on patches 5 % more.
"""

import sys
import time
from collections.abc import Callable

import numpy as np

from megatron_vlbridge.data.packing.offline import order_packs, pack_lengths

COUNT = 1_000_000
LIMIT_S, LIMIT, LIMIT_PATCHES = 0.5, 0.001, 0.05
ROUNDS = 5

type Ints = np.ndarray


def lengths_of(name: str) -> Ints:
    random = np.random.default_rng(0)
    draws = {
        "lognormal, median 493, in 8k": lambda: random.lognormal(6.2, 1.0, COUNT).clip(16, 8192),
        "uniform 64..4096, in 8k": lambda: random.integers(64, 4097, COUNT),
        "lognormal, median 898, in 32k": lambda: random.lognormal(6.8, 1.1, COUNT).clip(16, 32_768),
        "text 200, images 1200, in 8k": lambda: np.where(
            random.random(COUNT) < 0.5, random.normal(200, 60, COUNT), random.normal(1200, 250, COUNT)
        ).clip(16),
    }
    return draws[name]().astype(np.int64)


CAPACITIES = {
    "lognormal, median 493, in 8k": 8192,
    "uniform 64..4096, in 8k": 8192,
    "lognormal, median 898, in 32k": 32_768,
    "text 200, images 1200, in 8k": 8192,
}


def fastest[T](call: Callable[[], T], rounds: int = ROUNDS) -> tuple[float, T]:
    """Seconds of the processor's time, and the result."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        result = call()
        times.append(time.process_time() - begin)
    return min(times), result


def measure_tokens() -> bool:
    print(f"{COUNT:,} lengths, tokens alone; limits {LIMIT_S} s and {LIMIT:.1%} above the bound")
    good = True
    for name, capacity in CAPACITIES.items():
        lengths = lengths_of(name)
        bound = -(-int(lengths.sum()) // capacity)
        seconds, packing = fastest(lambda lengths=lengths, capacity=capacity: pack_lengths(lengths, capacity))
        packs = packing.packs
        above = len(packs) / bound - 1
        good &= seconds < LIMIT_S and above < LIMIT
        ordering, _ = fastest(lambda packs=packs, lengths=lengths: order_packs(packs, lengths, neighbors=8), 1)
        windows, packed = fastest(
            lambda lengths=lengths, capacity=capacity: pack_lengths(lengths, capacity, window=10_000), 1
        )
        print(f"{name:30} {len(packs):7,} packs, {above:+.3%}, {seconds:.2f} s", end="   ")
        print(f"windows of 10,000: {len(packed.packs) / bound - 1:+.3%}, {windows:.2f} s   order {ordering:.2f} s")
    return good


def measure_patches() -> bool:
    lengths = lengths_of("text 200, images 1200, in 8k")
    patches = np.where(lengths > 600, (lengths * 3.2).astype(np.int64), 0)
    print(f"\nText 200, images 1200 of 3.2 patches a token, 8k, with a limit on patches; limit {LIMIT_PATCHES:.0%}")
    good = True
    for limit in (12_288, 16_384, 24_576):
        bound = max(-(-int(lengths.sum()) // 8192), -(-int(patches.sum()) // limit))
        seconds, packing = fastest(
            lambda limit=limit: pack_lengths(lengths, 8192, patches=patches, max_patches=limit), 1
        )
        above = len(packing.packs) / bound - 1
        good &= above < LIMIT_PATCHES
        print(f"{limit:,} patches: {len(packing.packs):7,} packs, {above:+.3%}, {seconds:.2f} s")
    return good


def main() -> int:
    good = measure_tokens()
    return 0 if measure_patches() and good else 1


if __name__ == "__main__":
    sys.exit(main())
