"""Offline packing: which samples share a pack, from their lengths alone.

First fit decreasing: the longest sample that is left starts a pack, then always the longest that still fits is added.
Packs so filled are at most 11/9 of the optimum and 6/9 (Dosa 2007); on real lengths within a few of the lower bound
(`benchmarks/data.py`).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_vlbridge.errors import VLBridgeError

type Ints = NDArray[np.int64]
type Seed = int | Sequence[int]

PACKINGS = ("best-fit", "first-fit-decreasing")
TOO_LONG = ("error", "drop", "truncate")

# With a limit on patches: how many of the samples that have room in one dimension are tried for the other.
_TRIES = 16


@dataclass(frozen=True)
class PackingOptions:
    """How a dataset packs: `method` is one of `PACKINGS`, `too_long` of `TOO_LONG`.

    "best-fit" packs in the order of the epoch (`packs.best_fit`). "first-fit-decreasing" calls `pack_lengths` with
    `max_patches` and `window`, and `order_packs` with `neighbors`, which need it.
    """

    method: str = "best-fit"
    max_patches: int | None = None
    window: int | None = None
    neighbors: int = 1
    too_long: str = "error"

    def __post_init__(self) -> None:
        for name, choices in (("method", PACKINGS), ("too_long", TOO_LONG)):
            if getattr(self, name) not in choices:
                raise VLBridgeError(f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)}")
        if self.neighbors < 1:
            raise VLBridgeError(f"neighbors: expected at least 1, found {self.neighbors}")
        unused = [name for name in ("max_patches", "window") if getattr(self, name) is not None]
        unused += ["neighbors"] * (self.neighbors > 1)
        if self.method == "best-fit" and unused:
            raise VLBridgeError(f"{', '.join(unused)}: expected the packing first-fit-decreasing, found best-fit")


class Packing(NamedTuple):
    """`packs` holds the indices of each pack's samples, int64 `[n]`; `dropped` the samples that fit into none.

    Arrays, since Python's garbage collector would walk through a million lists.
    """

    packs: list[Ints]
    dropped: list[int]


def pack_lengths(
    lengths: ArrayLike,
    capacity: int,
    *,
    multiple_of: int = 1,
    patches: ArrayLike | None = None,
    max_patches: int | None = None,
    window: int | None = None,
    too_long: Literal["error", "drop"] = "error",
    seed: Seed = 0,
) -> Packing:
    """Put samples into packs of at most `capacity` tokens, and at most `max_patches` vision patches.

    A length is rounded up to a multiple of `multiple_of` (2 * the context-parallel size, the tensor-parallel size, or
    `--pack-multiple-of`). Samples are shuffled, then packed all at once, or `window` of them at a time: windows change
    which lengths meet from epoch to epoch, at the cost of slightly more packs. Every sample is in exactly one pack,
    except those that exceed a limit alone: an error, or with `too_long="drop"` returned as `dropped`, ascending. The
    result depends on the arguments alone. Packs are in the order in which they were filled, so those of the longest
    samples come first: shuffle them with `order_packs`.

    Raises VLBridgeError: a length is not positive, patches are negative or missing, a sample exceeds a limit.
    Example: `pack_lengths([5, 8, 3, 4], 10).packs` is `[array([1]), array([0, 3]), array([2])]`.
    """
    for name, value in (("capacity", capacity), ("multiple_of", multiple_of), ("window", window)):
        if value is not None and value < 1:
            raise VLBridgeError(f"{name}: expected at least 1, found {value}")
    sizes = _as_ints("lengths", lengths, lowest=1)
    sizes = -(-sizes // multiple_of) * multiple_of
    vision = None
    if max_patches is not None:
        vision = _as_ints("patches", [] if patches is None else patches, lowest=0)
        if len(vision) != len(sizes):
            raise VLBridgeError(f"patches: expected those of {len(sizes)} samples, found {len(vision)}")
    fits = sizes <= capacity
    if vision is not None and max_patches is not None:
        fits &= vision <= max_patches
    dropped = np.flatnonzero(~fits).tolist()
    if dropped and too_long != "drop":
        raise _too_long(dropped, sizes, capacity, vision, max_patches)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(fits))
    packs: list[Ints] = []
    for start in range(0, len(order), window or max(1, len(order))):
        part = order[start : start + window] if window else order
        if vision is None or max_patches is None:
            packs += _first_fit_decreasing(part, sizes[part], capacity)
        else:
            packs += _with_patches(part, sizes[part], vision[part], capacity, max_patches)
    return Packing(packs, dropped)


def order_packs(
    packs: Sequence[Ints], work: ArrayLike, *, neighbors: int = 1, start: int = 0, seed: Seed = 0
) -> list[Ints]:
    """Shuffle packs, in groups of `neighbors` whose vision work is alike.

    `work` is the vision work of each sample. Megatron gives neighboring packs to the data-parallel ranks: with as many
    `neighbors`, they finish their vision towers together. Groups begin at multiples of `neighbors`, counted with the
    `start` packs before these.

    Example: of four packs of one sample, with the work 9, 1, 8 and 2, and two neighbors, the first and the third are
    neighbors, and the second and the fourth.
    """
    if not packs:
        return []
    random = np.random.default_rng(seed)
    begins = np.cumsum([0, *map(len, packs[:-1])])
    loads = np.add.reduceat(_as_ints("work", work, lowest=0)[np.concatenate(packs)], begins)
    # Packs of the same work, such as those without images, are in random order.
    shuffled = random.permutation(len(packs))
    by_work = shuffled[np.argsort(loads[shuffled], kind="stable")]
    first = min(len(packs), -start % neighbors)
    sizes = np.diff(np.unique([0, first, *range(first, len(packs), neighbors), len(packs)]))
    # Runs of packs of like work become the groups in random order, so a run is as long as the group that it becomes.
    groups = random.permutation(len(sizes))
    group_of = np.repeat(groups, sizes[groups])
    order = by_work[np.lexsort((random.random(len(packs)), group_of))]
    return [packs[index] for index in order.tolist()]


def _first_fit_decreasing(samples: Ints, sizes: Ints, capacity: int) -> list[Ints]:
    """Samples of equal size are interchangeable, so packs are formed from counts: a pattern, and how often it repeats.

    Slot k stands for the k-th smallest of the different sizes, 0 for none.
    """
    by_size = np.argsort(sizes.astype(np.uint16) if capacity < 2**16 else sizes, kind="stable")
    values, starts, counts = np.unique(sizes[by_size], return_index=True, return_counts=True)
    size_of, left, place = ([0, *array.tolist()] for array in (values, counts, starts))
    below = list(range(len(left)))  # the next slot downwards that has samples; paths are shortened as they are walked
    parts: list[tuple[int, int, int, int, int]] = []  # first sample, samples of each pack, packs, offset, pack size
    patterns: list[tuple[int, int]] = []  # pack size, packs
    offset, largest = 0, len(values)
    while largest := _find(below, largest):
        pattern, room, slot = [], capacity, largest
        while slot:
            times = min(room // size_of[slot], left[slot])
            pattern.append((slot, times))
            room -= times * size_of[slot]
            slot = _find(below, min(slot, bisect_right(size_of, room)) - 1)
        repeats = min(left[slot] // times for slot, times in pattern)
        width, column = sum(times for _, times in pattern), 0
        for slot, times in pattern:
            parts.append((place[slot], times, repeats, offset + column, width))
            place[slot] += repeats * times
            left[slot] -= repeats * times
            column += times
            if not left[slot]:
                below[slot] = slot - 1
        patterns.append((width, repeats))
        offset += width * repeats
    return _expand(samples[by_size], parts, patterns)


def _find(below: list[int], slot: int) -> int:
    while below[slot] != slot:
        below[slot] = slot = below[below[slot]]
    return slot


def _expand(samples: Ints, parts: list[tuple[int, int, int, int, int]], patterns: list[tuple[int, int]]) -> list[Ints]:
    """The packs of all patterns; a part is the samples of one size in the packs of one pattern."""
    if not parts:
        return []
    first, times, repeats, offset, width = np.array(parts, dtype=np.int64).T
    counts = times * repeats
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pack, column = np.divmod(nth, np.repeat(times, counts))
    flat = np.empty(len(samples), dtype=np.int64)
    target = np.repeat(offset, counts) + pack * np.repeat(width, counts) + column
    flat[target] = samples[np.repeat(first, counts) + nth]
    widths, packs = np.array(patterns, dtype=np.int64).T
    ends = np.cumsum(np.repeat(widths, packs)).tolist()
    return [flat[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


class _Queue:
    """Samples that are heaviest in one dimension, by size; takes the largest that fits a pack."""

    def __init__(self, samples: Ints, main: Ints, other: Ints) -> None:
        order = np.lexsort((other, main))
        self.samples = samples[order].tolist()
        self.main, self.other = main[order].tolist(), other[order].tolist()
        self.below = list(range(len(self.main) + 1))  # slot k + 1 is sample k of the sorted, as above

    def find(self, main_room: int, other_room: int) -> int:
        """The slot of a sample that fits, 0 where none of the largest does."""
        slot = _find(self.below, bisect_right(self.main, main_room))
        for _ in range(_TRIES):
            if not slot or self.other[slot - 1] <= other_room:
                return slot
            slot = _find(self.below, slot - 1)
        return 0

    def take(self, slot: int) -> tuple[int, int, int]:
        """A sample and its sizes in both dimensions; it is no longer in the queue."""
        self.below[slot] = slot - 1
        return self.samples[slot - 1], self.main[slot - 1], self.other[slot - 1]


def _with_patches(samples: Ints, sizes: Ints, vision: Ints, capacity: int, max_patches: int) -> list[Ints]:
    """A pack takes samples that are heavy in the dimension of which it has more room left, so that both fill up."""
    heavy = vision * capacity > sizes * max_patches
    text = _Queue(samples[~heavy], sizes[~heavy], vision[~heavy])
    image = _Queue(samples[heavy], vision[heavy], sizes[heavy])
    packs: list[Ints] = []
    left = len(samples)
    while left:
        pack: list[int] = []
        tokens, patches = capacity, max_patches
        while True:
            of_text, of_image = text.find(tokens, patches), image.find(patches, tokens)
            prefer_text = tokens * max_patches > patches * capacity
            if not pack and of_text and of_image:
                # The larger of both starts a pack.
                prefer_text = text.main[of_text - 1] * max_patches >= image.main[of_image - 1] * capacity
            if of_text and (prefer_text or not of_image):
                sample, size, used = text.take(of_text)
            elif of_image:
                sample, used, size = image.take(of_image)
            else:
                break
            pack.append(sample)
            tokens, patches = tokens - size, patches - used
        packs.append(np.array(pack, dtype=np.int64))
        left -= len(pack)
    return packs


def _as_ints(name: str, values: ArrayLike, lowest: int) -> Ints:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise VLBridgeError(f"{name}: expected integers, found {array.dtype}")
    wrong = np.flatnonzero(array < lowest)
    if len(wrong):
        raise VLBridgeError(f"{name}: sample {wrong[0]}: expected at least {lowest}, found {array[wrong[0]]}")
    return array.astype(np.int64)


def _too_long(
    dropped: list[int], sizes: Ints, capacity: int, vision: Ints | None, max_patches: int | None
) -> VLBridgeError:
    first = dropped[0]
    found, limit = f"{sizes[first]} tokens", f"{capacity} tokens"
    if vision is not None:
        found, limit = f"{found} and {vision[first]} patches", f"{limit} and {max_patches} patches"
    return VLBridgeError(
        f"{len(dropped)} samples exceed the limits of a pack, {limit}; the first is sample {first} with {found}. Raise "
        "the limits or drop them (too_long='drop')"
    )
