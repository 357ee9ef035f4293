"""Which conversations take the places of those that cannot be encoded, and how many may fail."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_vlbridge.errors import VLBridgeError

ATTEMPTS = 100
# A share of fewer conversations says little.
LEAST = 1000

type Ints = Sequence[int] | np.ndarray

logger = logging.getLogger(__name__)


def check_share(max_share: float) -> None:
    """Check the share of conversations that may fail (VLBridgeError if it is none)."""
    if not 0 <= max_share < 1:
        raise VLBridgeError(f"max_bad_samples: expected a share from 0 to below 1, found {max_share}")


class Replacements:
    """Replaces a conversation that fails by another one that has no more tokens and patches, so that the pack holds it.

    Which one is a pure function of `seed`, the index of the pack and the conversation, so it is the same on every rank,
    loader process and resumed run. `lengths` and `patches` are those of all N conversations. `max_share` is the share
    of the conversations read so far that may fail, where at least `LEAST` or N count as read. `log`: whether this
    process logs failures; of those that read the same packs one should.

    Example: `next(Replacements([5, 3, 9], [0, 0, 0], seed=0, max_share=0.01).candidates(pack=7, member=0))` is 1.
    """

    def __init__(self, lengths: Ints, patches: Ints, *, seed: int, max_share: float, log: bool = True) -> None:
        check_share(max_share)
        self.lengths, self.patches = np.asarray(lengths), np.asarray(patches)
        self.seed, self.max_share, self.log = seed, max_share, log
        self.num_read = 0
        self.failures: dict[int, str] = {}
        self._by_length = np.argsort(self.lengths, kind="stable")
        self._sorted = self.lengths[self._by_length]

    def candidates(self, pack: int, member: int) -> Iterator[int]:
        """The conversations to try in the place of `member`, in order; at most `ATTEMPTS`."""
        random = np.random.default_rng((self.seed, pack, member))
        # Those of 0 tokens cannot be encoded either.
        first, end = np.searchsorted(self._sorted, (0, self.lengths[member]), "right").tolist()
        for place in random.integers(first, end, size=ATTEMPTS).tolist():
            candidate = int(self._by_length[place])
            if candidate != member and self.patches[candidate] <= self.patches[member]:
                yield candidate

    def note_read(self) -> None:
        """Count a conversation that was read."""
        self.num_read += 1

    def note_failure(self, member: int, error: VLBridgeError) -> None:
        """Count and log a conversation that failed; each is logged once.

        Raises VLBridgeError: none may fail (that error itself), or more than `max_share` failed.
        """
        if not self.max_share:
            raise error
        if member in self.failures:
            return
        self.failures[member] = str(error)
        if self.log:
            logger.warning("replaced: %s", self.failures[member])
        read = max(self.num_read, min(LEAST, len(self.lengths)))
        if len(self.failures) > self.max_share * read:
            raise VLBridgeError(
                f"{len(self.failures)} conversations cannot be encoded, and this process has read {self.num_read}: "
                f"more than --max-bad-samples {self.max_share} of {read}; the last: {error}"
            ) from error
