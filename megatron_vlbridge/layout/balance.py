"""Sharing out the frames of a batch over ranks so that all work about the same."""

import heapq
from collections.abc import Sequence

_FEW = 64


def frame_work(patches: int, hidden_size: int) -> int:
    """What the tower works on a frame: the linears grow with its patches, attention with their square.

    In multiply-adds per layer: 12 * n * h^2 (qkv, projection and an MLP of four times the width) + 2 * n^2 * h, over h.
    """
    return 12 * patches * hidden_size + 2 * patches**2


def share_out(work: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """For each rank the numbers of its items, so that the largest load is small: longest first, to the least loaded.

    The largest load is at most 4/3 of the optimum (Graham 1969), then lowered by moving and swapping items while that
    helps. Depends on the arguments alone, so all ranks come to the same answer without a word.

    Example:
        >>> share_out([64, 4096, 64, 64], 2)
        ((1,), (0, 2, 3))
    """
    loads = [(0, rank) for rank in range(ranks)]
    items: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(work)), key=lambda number: (-work[number], number)):
        load, rank = heapq.heappop(loads)
        items[rank].append(number)
        heapq.heappush(loads, (load + work[number], rank))
    # Many items are level by themselves; a few are not, and are soon looked through.
    while len(work) <= _FEW and _improve(work, items):
        pass
    return tuple(tuple(sorted(mine)) for mine in items)


def _improve(work: Sequence[int], items: list[list[int]]) -> bool:
    """Move an item away from the busiest rank, or swap it for a smaller one, if both ranks end below its load."""
    loads = [sum(work[number] for number in mine) for mine in items]
    busiest = max(range(len(items)), key=lambda rank: loads[rank])
    for mine in items[busiest]:
        for other in range(len(items)):
            for theirs in (None, *items[other]):
                gain = work[mine] - (0 if theirs is None else work[theirs])
                if other != busiest and gain > 0 and loads[other] + gain < loads[busiest]:
                    items[busiest].remove(mine)
                    items[other].append(mine)
                    if theirs is not None:
                        items[other].remove(theirs)
                        items[busiest].append(theirs)
                    return True
    return False
