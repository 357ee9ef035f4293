"""Which conversations an epoch takes, and how often."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vlbridge.errors import VLBridgeError

MAX_MEMBERS = 200_000_000  # conversations of an epoch

type Ints = NDArray[np.int64]


class Share(NamedTuple):
    """The conversations `begin` to `end` are those of one source; an epoch takes each of them `weight` times."""

    begin: int
    end: int
    weight: Fraction


def check_shares(kept: Ints, shares: Sequence[Share]) -> None:
    """Check that each epoch takes a conversation of those that are `kept` (ascending), and not too many.

    Raises VLBridgeError: with the sizes.
    """
    sizes = [
        share.weight * int(np.searchsorted(kept, share.end) - np.searchsorted(kept, share.begin)) for share in shares
    ]
    if max(sizes) < 1:
        raise VLBridgeError(
            f"weights: an epoch would take {float(max(sizes)):.3g} conversations of the source of which it takes most; "
            "increase the weights until it takes at least 1"
        )
    if sum(sizes) > MAX_MEMBERS and any(share.weight > 1 for share in shares):
        raise VLBridgeError(
            f"weights: an epoch would take {float(sum(sizes)):,.0f} conversations; lower the weights until it takes at "
            f"most {MAX_MEMBERS:,}"
        )


def epoch_members(kept: Ints, shares: Sequence[Share], *, seed: int, epoch: int) -> Ints:
    """The conversations of an epoch, by source: a pure function of its arguments.

    Of the weight w, an epoch takes every conversation of the source in `kept` (ascending) floor(w) times. The share
    w - floor(w) of them, in a random order of `seed`, is taken once more; the next epoch continues where this one
    ends. So over any number of epochs, two conversations of a source differ by at most one.

    Example: `epoch_members(np.arange(3), [Share(0, 3, Fraction(2))], seed=0, epoch=0)` is `[0, 1, 2, 0, 1, 2]`.
    """
    parts = [kept[:0]]
    for source, share in enumerate(shares):
        own = kept[np.searchsorted(kept, share.begin) : np.searchsorted(kept, share.end)]
        whole, rest = divmod(share.weight, 1)
        parts += [own] * whole
        first, last = (math.floor(number * rest * len(own)) for number in (epoch, epoch + 1))
        if first < last:
            order = np.random.default_rng((seed, source, 1)).permutation(own)
            parts.append(order[np.arange(first, last) % len(own)])
    return np.concatenate(parts)
