"""The loss of a micro-batch is a sum and a token count, not a mean."""

import pytest
import torch

from megatron_vlbridge.training.step import token_loss


def test_masked_tokens_are_neither_in_the_sum_nor_in_the_count():
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    losses = torch.tensor([[2.0, 50.0, 3.0, 70.0]], requires_grad=True)
    total, count, report = token_loss(mask, losses)
    assert total.item() == 5.0
    assert count.item() == 2
    assert count.dtype == torch.int32
    assert report["lm loss"].tolist() == [5.0, 2.0]
    assert not report["lm loss"].requires_grad
    total.backward()
    assert torch.equal(losses.grad, mask)


def test_without_supervised_tokens_loss_and_gradient_are_zero():
    losses = torch.tensor([[2.0, 50.0]], requires_grad=True)
    total, count, _ = token_loss(torch.zeros(1, 2), losses)
    assert (total.item(), count.item()) == (0.0, 0)
    total.backward()
    assert losses.grad.tolist() == [[0.0, 0.0]]


def test_bf16_losses_are_summed_in_fp32():
    losses = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    total, count, _ = token_loss(torch.ones(1, 4096), losses)
    assert total.dtype == torch.float32
    assert total.item() == 4096 * 1.0078125
    assert count.item() == 4096


@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [0, 3, 0], [1, 0, 5000]])
def test_the_loss_in_the_log_is_zero_or_the_mean_of_the_supervised_tokens(counts: list[int]) -> None:
    """Megatron divides the sum of the sums by the sum of the counts, which without a supervised token must not be 0."""
    masks = [(torch.arange(5000) < count).float()[None] for count in counts]
    reports = [token_loss(mask, torch.full((1, 5000), 2.5))[2]["lm loss"] for mask in masks]
    total, count = torch.vstack(reports).sum(dim=0)
    assert (total / count).item() == (2.5 if any(counts) else 0.0)
