"""Which conversations are in each pack, epoch after epoch."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_vlbridge.data.packing.offline import PackingOptions, order_packs, pack_lengths
from megatron_vlbridge.data.packing.packs import best_fit
from megatron_vlbridge.data.sources.sampling import Share, check_shares, epoch_members

type Ints = NDArray[np.int64]


class EpochPlan:
    """The packs of each epoch: a pure function of the arguments.

    `rows` are those of a table of lengths, of all conversations; `kept` (ascending) the conversations that are packed.
    For the rest see `dataset.PackedConversations`.

    Raises VLBridgeError: the weights of `shares` are too small or too large.

    Example: `EpochPlan(table.rows, np.arange(9), shares, PackingOptions(), seq_length=64).members(0)`.
    """

    def __init__(
        self,
        rows: np.ndarray,
        kept: Ints,
        shares: Sequence[Share],
        packing: PackingOptions,
        *,
        seq_length: int,
        multiple_of: int = 1,
        seed: int = 0,
    ) -> None:
        check_shares(kept, shares)
        self._rows, self._kept, self._shares, self._packing = rows, kept, shares, packing
        self._seq_length, self._multiple_of, self._seed = seq_length, multiple_of, seed
        self._epoch_starts = [0]
        self._cached_epoch: tuple[int, list[list[int]]] = (-1, [])

    def members(self, index: int) -> list[int]:
        """The indices of the conversations in pack `index`, in order."""
        while index >= self._epoch_starts[-1]:
            self._epoch_start(len(self._epoch_starts))
        epoch = bisect_right(self._epoch_starts, index) - 1
        return self.epoch_packs(epoch)[index - self._epoch_starts[epoch]]

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch, each as a list of conversation indices; the last requested epoch is cached."""
        if self._cached_epoch[0] != epoch:
            pack = self._best_fit if self._packing.method == "best-fit" else self._first_fit_decreasing
            self._cached_epoch = epoch, pack(epoch)
        return self._cached_epoch[1]

    def _epoch_start(self, epoch: int) -> int:
        """The number of packs in the epochs before this one."""
        while len(self._epoch_starts) <= epoch:
            last = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[last] + len(self.epoch_packs(last)))
        return self._epoch_starts[epoch]

    def _best_fit(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng((self._seed, epoch)).permutation(self._members(epoch))
        lengths = -(-self._rows["tokens"][order] // self._multiple_of) * self._multiple_of
        packs = best_fit(lengths.tolist(), self._seq_length)
        return [order[positions].tolist() for positions in packs]

    def _first_fit_decreasing(self, epoch: int) -> list[list[int]]:
        options, seed, members = self._packing, (self._seed, epoch), self._members(epoch)
        rows = self._rows[members]
        packs = pack_lengths(
            rows["tokens"],
            self._seq_length,
            multiple_of=self._multiple_of,
            patches=rows["patches"],
            max_patches=options.max_patches,
            window=options.window,
            seed=seed,
        ).packs
        start = self._epoch_start(epoch)
        ordered = order_packs(packs, rows["work"], neighbors=options.neighbors, start=start, seed=seed)
        return [members[places].tolist() for places in ordered]

    def _members(self, epoch: int) -> Ints:
        return epoch_members(self._kept, self._shares, seed=self._seed, epoch=epoch)
