"""What a run has read of each source, and what it left out, cut or replaced."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from megatron_vlbridge.data.dataset import PackedConversations

type Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SourceCounts:
    """Of the `conversations` of a source some are `dropped` (too long), `truncated` or `failed` (cannot be measured).

    `unlearned_turns` of the others' `assistant_turns` are excluded from the loss or not to be learned. `read` counts
    the conversations of the packs read so far, each time that one is read, and `replaced` those of them that could not
    be encoded.
    """

    source: str
    conversations: int
    dropped: int
    truncated: int
    failed: int
    assistant_turns: int
    unlearned_turns: int
    read: int
    replaced: int

    def __str__(self) -> str:
        left = {"dropped": self.dropped, "truncated": self.truncated, "invalid": self.failed}
        parts = [f"{count:,} {name}" for name, count in left.items() if count]
        if self.unlearned_turns:
            parts.append(f"{self.unlearned_turns:,} of {self.assistant_turns:,} answers not learned")
        read = f"{self.read:,} read" + (f", {self.replaced:,} replaced" if self.replaced else "")
        return f"{self.source}: {read}; of {self.conversations:,} conversations {', '.join(parts) or 'none left out'}"


class SourceCounter:
    """Counts for a dataset; what an epoch takes of each source is counted once.

    Example: `SourceCounter(dataset)(num_packs=100, replaced=[0])[0].read`.
    """

    def __init__(self, dataset: PackedConversations) -> None:
        self.dataset = dataset
        self._ends = np.array([share.end for share in dataset.shares])
        # Of each epoch from the first: its number of packs, and how many conversations of each source they hold.
        self._epochs: list[tuple[int, Ints]] = []

    def __call__(self, num_packs: int, replaced: Sequence[int]) -> list[SourceCounts]:
        """The counts of each source after the first `num_packs` packs; `replaced` has an entry for each source."""
        dataset, read = self.dataset, self._read(num_packs)
        chosen = dataset.selection
        kept = chosen.kept_rows
        turns, unlearned = kept["assistant_turns"], kept["excluded_turns"] + kept["skipped_turns"]
        source_of_kept = self._sources(chosen.kept)
        columns = zip(
            dataset.source_names,
            np.diff(self._ends, prepend=0),
            *(self._count(indices) for indices in (chosen.dropped, list(chosen.truncated), chosen.failed)),
            *(np.bincount(source_of_kept, x, len(self._ends)).astype(np.int64) for x in (turns, unlearned)),
            read,
            replaced,
            strict=True,
        )
        return [SourceCounts(str(name), *map(int, counts)) for name, *counts in columns]

    def _read(self, num_packs: int) -> Ints:
        total, epoch = np.zeros(len(self._ends), np.int64), 0
        while num_packs > 0:
            if epoch < len(self._epochs) and self._epochs[epoch][0] <= num_packs:
                size, counts = self._epochs[epoch]
            else:
                packs = self.dataset.epoch_packs(epoch)
                size, counts = len(packs), self._count(list(chain(*packs[:num_packs])))
                if size <= num_packs and epoch == len(self._epochs):
                    self._epochs.append((size, counts))
            total, num_packs, epoch = total + counts, num_packs - size, epoch + 1
        return total

    def _count(self, indices: Sequence[int]) -> Ints:
        """How many of these conversations are of each source."""
        return np.bincount(self._sources(np.asarray(indices, dtype=np.int64)), minlength=len(self._ends))

    def _sources(self, indices: Ints) -> Ints:
        return np.searchsorted(self._ends, indices, "right")
