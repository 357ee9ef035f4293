"""How full the packs of an epoch are, and how evenly they spread the vision work over data-parallel ranks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

type Ints = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class PackReport:
    """The packs of an epoch.

    `fill` is the share of conversations' tokens in all tokens, `padding` that of the room which their lengths are
    rounded up by, `empty` that of the ends of packs. `patches` has the patches of each data-parallel rank.
    `work_imbalance` is the vision work of the busiest rank over the mean of all ranks, on average over the steps.
    """

    packs: int
    conversations: int
    tokens: int
    fill: float
    padding: float
    empty: float
    patches: tuple[int, ...]
    work_imbalance: float

    def as_json(self) -> dict[str, Any]:
        """All values by name."""
        return asdict(self)


def pack_report(
    packs: Sequence[Sequence[int]],
    lengths: Ints,
    patches: Ints,
    work: Ints,
    *,
    seq_length: int,
    multiple_of: int = 1,
    data_parallel: int = 1,
) -> PackReport:
    """The report on `packs`, lists of conversation indices; lengths, patches and work are by conversation.

    Pack i is read by data-parallel rank i modulo their number; an incomplete last step is not counted in
    `work_imbalance`.

    Example: `pack_report([[0, 1]], [3, 4], [0, 8], [0, 1], seq_length=8).fill` is 0.875.
    """
    length_of, patches_of, work_of = (np.asarray(values, np.int64) for values in (lengths, patches, work))
    members = np.concatenate([np.asarray(pack, np.int64) for pack in packs])
    tokens = int(length_of[members].sum())
    rounded = int((-(-length_of[members] // multiple_of) * multiple_of).sum())
    room = len(packs) * seq_length
    of_pack = np.asarray([(patches_of[pack].sum(), work_of[pack].sum()) for pack in map(np.asarray, packs)])
    steps = of_pack[: len(packs) // data_parallel * data_parallel, 1].reshape(-1, data_parallel)
    steps = steps[steps.any(1)]
    return PackReport(
        packs=len(packs),
        conversations=len(members),
        tokens=tokens,
        fill=tokens / room,
        padding=(rounded - tokens) / room,
        empty=(room - rounded) / room,
        patches=tuple(int(of_pack[rank::data_parallel, 0].sum()) for rank in range(data_parallel)),
        work_imbalance=float((steps.max(1) / steps.mean(1)).mean()) if len(steps) else 1.0,
    )
