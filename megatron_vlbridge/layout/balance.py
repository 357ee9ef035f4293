"""Sharing out the frames of a batch over ranks so that all work about the same."""

import heapq
from collections.abc import Iterator, Sequence
from math import gcd

# Beyond so many items longest-first is level by itself.
_FEW = 256
# Steps of the search: six milliseconds or so at most, which as a rule is enough for the optimum of up to 24 items;
# more of them take longer steps and leave less to gain, so they get fewer (two milliseconds or so).
_STEPS, _EXACT = 6000, 24
_PAIR_STEPS = 100

Share = tuple[int, ...]


def frame_work(patches: int, hidden_size: int) -> int:
    """What the tower works on a frame: the linears grow with its patches, attention with their square.

    In multiply-adds per layer: 12 * n * h^2 (qkv, projection and an MLP of four times the width) + 2 * n^2 * h, over h.
    """
    return 12 * patches * hidden_size + 2 * patches**2


def share_out(work: Sequence[int], ranks: int) -> tuple[Share, ...]:
    """For each rank the numbers of its items, so that the largest load is small: the optimum wherever it is soon found.

    Longest first, to the least loaded, which is at most 4/3 of the optimum (Graham 1969); then a search for shares
    under ever lower limits, which ends at the optimum or after a fixed number of steps. The result depends on the
    arguments alone, so all ranks come to the same answer without a word.

    Example:
        >>> share_out([64, 4096, 64, 64], 2)
        ((1,), (0, 2, 3))
    """
    shares = _longest_first(work, ranks)
    if work and len(work) <= _FEW:
        # Limits are tried in whole units, so the coarser the unit, the fewer they are.
        unit = gcd(*work)
        steps = _STEPS if len(work) <= _EXACT else 10 * _STEPS // len(work)
        search = _Search([size // unit for size in work], steps)
        shares = search.lowered(search.levelled(shares), search.steps)
    return tuple(tuple(sorted(share)) for share in shares)


def least_load(work: Sequence[int], ranks: int) -> int:
    """No way of sharing out has a largest load below this.

    Some rank has the mean or more; and of the k * ranks + 1 largest items some rank has k + 1, for every k.
    """
    sizes = sorted(work, reverse=True)
    crowded = (sum(sizes[last - last // ranks : last + 1]) for last in range(0, len(sizes), ranks))
    return max(-(-sum(sizes) // ranks), *crowded, 0)


def _longest_first(work: Sequence[int], ranks: int) -> list[Share]:
    loads = [(0, rank) for rank in range(ranks)]
    items: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(work)), key=lambda number: (-work[number], number)):
        load, rank = heapq.heappop(loads)
        items[rank].append(number)
        heapq.heappush(loads, (load + work[number], rank))
    return [tuple(mine) for mine in items]


class _Search:
    """Better shares of `work`, as far as a number of `steps` leads (counted, not timed: all ranks stop alike)."""

    def __init__(self, work: Sequence[int], steps: int) -> None:
        self.work = work
        self.steps = steps
        self._stop = 0

    def levelled(self, shares: list[Share]) -> list[Share]:
        """Share the busiest rank's items and another's out anew between the two, while that helps, for half the steps.

        Many items leave too many ways to look through them all at once, but any two ranks are soon level.
        """
        shares, stop = list(shares), self.steps // 2
        low = least_load(self.work, len(shares))
        while self.steps > stop:
            order = sorted(range(len(shares)), key=lambda rank: self._load(shares[rank]))
            busiest = order.pop()
            load = self._load(shares[busiest])
            if load == low:
                break
            for other in order:
                pair = self.lowered([shares[other], shares[busiest]], _PAIR_STEPS)
                if max(map(self._load, pair)) < load:
                    shares[other], shares[busiest] = pair
                    break
            else:
                break
        return shares

    def lowered(self, shares: list[Share], steps: int) -> list[Share]:
        """The items of `shares` under the lowest limit that is found in so many steps, by bisection.

        An attempt gets half of the steps that are left; one that finds nothing in them counts as impossible.
        """
        items = tuple(sorted((number for share in shares for number in share), key=lambda n: (-self.work[n], n)))
        low, high = least_load([self.work[n] for n in items], len(shares)), max(map(self._load, shares))
        last = max(0, self.steps - steps)
        while low < high and self.steps > last:
            limit = (low + high) // 2
            self._stop = (self.steps + last) // 2
            found = self._fit(items, len(shares), limit)
            if found is None:
                low = limit + 1
            else:
                shares, high = found, max(map(self._load, found))
        return shares

    def _fit(self, items: Share, ranks: int, limit: int) -> list[Share] | None:
        """Shares of `items` (largest first) of at most `limit` each, one rank after the other."""
        spare = ranks * limit - self._load(items)
        if spare < 0:
            return None
        if ranks == 1 or not items:
            return [items, *[()] * (ranks - 1)]
        for share in self._fillings(items, limit, limit - spare):
            rest = self._fit(tuple(number for number in items if number not in share), ranks - 1, limit)
            if rest is not None:
                return [share, *rest]
        return None

    def _fillings(self, items: Share, limit: int, least: int) -> Iterator[Share]:
        """Shares with the first item and a load from `least` to `limit` that no better one can stand for.

        A better one has an item more, or a larger in place of a smaller; what it gave up fits where that item was.
        """
        sizes = [self.work[number] for number in items]
        end = len(items)
        behind = [0] * (end + 1)
        smaller = [end] * end
        for place in reversed(range(end)):
            behind[place] = behind[place + 1] + sizes[place]
            if place + 1 < end:
                smaller[place] = smaller[place + 1] if sizes[place] == sizes[place + 1] else place + 1
        chosen = [items[0]]

        def fill(place: int, load: int, left_out: int, growth: int) -> Iterator[Share]:
            """`left_out`: the smallest item left out so far; `growth`: the least that a better share has more."""
            while self.steps > self._stop:
                self.steps -= 1
                while place < end and load + sizes[place] > limit:
                    left_out = sizes[place]
                    place = smaller[place]
                if load + behind[place] < least:
                    return
                if place == end:
                    if load + growth > limit:
                        yield tuple(chosen)
                    return
                size = sizes[place]
                chosen.append(items[place])
                yield from fill(place + 1, load + size, left_out, min(growth, left_out - size))
                chosen.pop()
                left_out, growth = size, min(growth, size)
                place = smaller[place]

        return fill(1, sizes[0], 2 * limit + 2, limit + 1)

    def _load(self, share: Share) -> int:
        return sum(self.work[number] for number in share)
