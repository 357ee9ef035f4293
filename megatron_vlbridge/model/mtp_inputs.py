"""What a layer that predicts the token after the next one needs of a pack."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class MtpInputs:
    """Of each token the next one in its segment, and the token after that as a label; all follow the pack's layout.

    `tokens` `[1, T]`; `labels` `[1, T]` and `weights` `[1, T]` only where a loss is wanted, 0 where a token has none.
    A weight is `n / m` where the pack has `n` supervised tokens and `m` of these have a supervised token behind them in
    their segment, so that further predictions count as much as the first, as in Megatron. `n` and `m` are those of the
    whole pack on every rank. `supervised` is `m`.
    """

    tokens: torch.Tensor
    labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    supervised: int = 0

    @classmethod
    def from_pack(
        cls, tokens: torch.Tensor, labels: torch.Tensor | None, lengths: Sequence[int], filler: int, ignored: int
    ) -> "MtpInputs":
        """From a whole pack: its tokens and labels `[1, T]` (`ignored` where there is no loss) and true lengths.

        Example:
            >>> MtpInputs.from_pack(torch.tensor([[5, 6, 7, 8]]), None, [3, 1], filler=0, ignored=-100).tokens
            tensor([[6, 7, 0, 0]])
        """
        following = next_in_segment(tokens, lengths, filler)
        if labels is None:
            return cls(following)
        further = next_in_segment(labels, lengths, ignored)
        mask = further != ignored
        count, supervised = int((labels != ignored).sum()), int(mask.sum())
        return cls(following, further.masked_fill(~mask, 0), mask * (count / max(supervised, 1)), supervised)

    def without_labels(self) -> "MtpInputs":
        """For a stage that has no loss."""
        return replace(self, labels=None, weights=None)


def next_in_segment(row: torch.Tensor, lengths: Sequence[int], fill: int) -> torch.Tensor:
    """`row` `[1, T]` moved left by one inside each segment; `fill` at the last token of each and behind them all."""
    result = row.roll(-1, dims=-1)
    result[..., torch.tensor(lengths).cumsum(0) - 1] = fill
    result[..., sum(lengths) :] = fill
    return result
