"""The loss of a micro-batch, in the form that Megatron's schedules average over all tokens of the global batch."""

import torch


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over the supervised tokens, their number, and both for the log.

    Takes `loss_mask` `[1, T]` (1 or 0) and the `losses` `[1, T]` of each token. Megatron divides by the number of all
    supervised tokens of the global batch (`--calculate-per-token-loss`), so a rank with few of them weighs no more.

    Example:
        >>> token_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 9.0]]))[0]
        tensor(2.)
    """
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack((total.detach(), count.to(total.dtype)))}
