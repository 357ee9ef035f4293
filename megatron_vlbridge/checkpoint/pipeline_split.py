"""How decoder layers split over pipeline stages, and the arguments with which Megatron splits them so."""

from collections.abc import Sequence
from itertools import accumulate, pairwise, product

_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"


def split_layers(layers: int, stages: int) -> list[int]:
    """Layers of each stage, where Megatron lets only the first and the last one differ. `stages` is at most `layers`.

    An even split if there is one. Otherwise the largest stage is as small as can be, and then the two ends are, which
    hold the vision tower and the output head besides.

    Example: `split_layers(28, 8)` is `[2, 4, 4, 4, 4, 4, 4, 2]`.
    """
    if layers % stages == 0:
        return [layers // stages] * stages
    found = []
    for first, last in product(range(1, layers), repeat=2):
        each, rest = divmod(layers - first - last, stages - 2) if stages > 2 else (last, layers - first - last)
        if rest == 0 and each > 0:
            found.append([first, *[each] * (stages - 2), last])
    return min(found, key=lambda sizes: (max(sizes), sizes[0] + sizes[-1], abs(sizes[0] - sizes[-1]), sizes[0]))


def split_arguments(sizes: Sequence[int]) -> list[str]:
    """Megatron's arguments for a split; none for an even one.

    Example: `split_arguments([10, 10, 8])` is `["--decoder-last-pipeline-num-layers", "8"]`.
    """
    if len(set(sizes)) == 1:
        return []
    each = sizes[1] if len(sizes) > 2 else sizes[-1]
    first = [_FIRST, str(sizes[0])] if sizes[0] != each else []
    last = [_LAST, str(sizes[-1])] if sizes[-1] != each else []
    return first + last


def layer_ranges(sizes: Sequence[int]) -> list[range]:
    """The layers of each stage, counted from 0."""
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
