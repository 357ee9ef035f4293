"""The loss of a micro-batch, as the sum and count that Megatron averages over the tokens of the global batch."""

import torch


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the losses of the supervised tokens, their count, and both for the log.

    Takes `loss_mask` `[1, T]` (1 or 0) and the per-token `losses` `[1, T]`. Megatron divides by the number of
    supervised tokens in the global batch (`--calculate-per-token-loss`), so every token has the same weight.

    Example:
        >>> token_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 9.0]]))[0]
        tensor(2.)
    """
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack((total.detach(), count.to(total.dtype)))}
