"""What an MTP layer, which predicts the token after the next one, needs of a pack."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from megatron_vlbridge.layout.batch_layout import gather


@dataclass(frozen=True)
class MtpInputs:
    """Of each token the next one in its segment, and the token after that as a label; all follow the pack's layout.

    `tokens` `[1, T]`; `labels` `[1, T]` and `weights` `[1, T]` only where a loss is wanted, 0 where a token has none.
    A weight is `n / m` where the pack has `n` supervised tokens and `m` of these have a supervised token after them in
    their segment, so that the MTP loss counts as much as the first, as in Megatron; where labels have weights, it is
    multiplied by that of the label. `n` and `m` are those of the whole pack on every rank. `supervised` is `m`.
    """

    tokens: torch.Tensor
    labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    supervised: int = 0

    @classmethod
    def from_pack(
        cls,
        tokens: torch.Tensor,
        labels: torch.Tensor | None,
        lengths: Sequence[int],
        filler: int,
        ignored: int,
        loss_weights: torch.Tensor | None = None,
    ) -> Self:
        """From a whole pack: its tokens and labels `[1, T]` (`ignored` where there is no loss) and true lengths.

        `loss_weights` `[1, T]` are those of the labels, if any.

        Example: `MtpInputs.from_pack(torch.tensor([[5, 6, 7, 8]]), None, [3, 1], filler=0, ignored=-100).tokens` is
        `tensor([[6, 7, 0, 0]])`.
        """
        next_tokens = next_in_segment(tokens, lengths, filler)
        if labels is None:
            return cls(next_tokens)
        next_labels = next_in_segment(labels, lengths, ignored)
        mask = next_labels != ignored
        count, supervised = int((labels != ignored).sum()), int(mask.sum())
        weights = mask * (count / max(supervised, 1))
        if loss_weights is not None:
            weights = weights * next_in_segment(loss_weights, lengths, 0)
        return cls(next_tokens, next_labels.masked_fill(~mask, 0), weights, supervised)

    def gather(self, index: torch.Tensor, filler: int) -> Self:
        """A context-parallel rank's part, by its layout's `gather_index`."""
        return replace(
            self,
            tokens=gather(self.tokens, index, filler),
            labels=None if self.labels is None else gather(self.labels, index, 0),
            weights=None if self.weights is None else gather(self.weights, index, 0),
        )

    def without_labels(self) -> Self:
        """For a stage that has no loss."""
        return replace(self, labels=None, weights=None)


def next_in_segment(row: torch.Tensor, lengths: Sequence[int], fill: int) -> torch.Tensor:
    """`row` `[1, T]` shifted left by one inside each segment; `fill` at the last token of each, and in the padding."""
    result = row.roll(-1, dims=-1)
    result[..., torch.tensor(lengths).cumsum(0) - 1] = fill
    result[..., sum(lengths) :] = fill
    return result
