"""Partitioning the frames of a batch over ranks so that all ranks do about the same work."""

import heapq
from collections.abc import Sequence


def frame_work(patches: int, hidden_size: int) -> int:
    """The tower's work on a frame: the linears grow with its patches, attention with their square.

    In multiply-adds per layer: 12 * n * h^2 (qkv, projection and an MLP of four times the width) + 2 * n^2 * h, over h.
    """
    return 12 * patches * hidden_size + 2 * patches**2


def partition(work: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """For each rank the indices of its items, ascending, so that the largest load is small.

    Longest processing time first: the largest item that is left goes to the rank with the smallest load. The largest
    load is at most 4/3 - 1 / (3 * ranks) times the optimum (Graham 1969), and on random images and videos within a few
    per cent (`benchmarks/layout.py`). The result depends on the arguments alone, so all ranks compute the same.

    Example: `partition([64, 4096, 64, 64], 2)` is `((1,), (0, 2, 3))`.
    """
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(work)), key=lambda item: -work[item]):
        load, rank = loads[0]
        shares[rank].append(item)
        heapq.heapreplace(loads, (load + work[item], rank))
    return tuple(tuple(sorted(share)) for share in shares)
