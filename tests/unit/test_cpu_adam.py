"""The CPU backend's Adam is torch's, but for where its state counts the steps."""

import pytest
import torch

from megatron_vlbridge.backends.cpu_adam import CpuAdam

OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(size, generator=random)) for size in ((5, 7), (11,))]


def train(optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    """The parameters after some steps with gradients of their own."""
    (group,) = optimizer.param_groups
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
    return [p.detach().clone() for p in group["params"]]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(("decoupled", "torchs"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_it_steps_as_torchs(decoupled: bool, torchs: type) -> None:
    found = train(CpuAdam(parameters(), **OPTIONS, adam_w_mode=decoupled), range(4))
    assert_equal(found, train(torchs(parameters(), **OPTIONS, foreach=False), range(4)))


def test_its_state_is_that_of_fused_adam() -> None:
    """The entries that Transformer Engine's documentation names: moments of parameters, steps of groups."""
    optimizer = CpuAdam(parameters(), **OPTIONS)
    train(optimizer, range(3))
    state = optimizer.state_dict()
    assert [set(of_parameter) for of_parameter in state["state"].values()] == [{"exp_avg", "exp_avg_sq"}] * 2
    (group,) = state["param_groups"]
    assert group.keys() == {"params", "lr", "bias_correction", "betas", "eps", "weight_decay", "step"}
    assert (group["step"], group["bias_correction"]) == (3, True)


@pytest.mark.parametrize("writer", [CpuAdam, torch.optim.AdamW])
def test_it_continues_its_own_state_and_torchs(writer: type) -> None:
    whole = train(CpuAdam(parameters(), **OPTIONS), range(5))
    before = writer(parameters(), **OPTIONS)
    middle = train(before, range(2))
    after = CpuAdam([torch.nn.Parameter(p) for p in middle], **OPTIONS)
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["bias_correction"]
    assert_equal(train(after, range(2, 5)), whole)


def test_a_parameter_without_a_gradient_stays() -> None:
    first, second = parameters()
    optimizer = CpuAdam([first, second], **OPTIONS)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, parameters()[1])
    assert not torch.equal(first, parameters()[0])
