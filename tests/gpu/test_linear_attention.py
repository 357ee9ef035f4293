"""The kernels that Megatron's `GatedDeltaNet` takes from flash-linear-attention, against the CPU backend's, in bf16."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch

from megatron_vlbridge.backends import delta_rule
from tests.closeness import relative_error

pytestmark = pytest.mark.gpu

HEADS, WIDTH = 4, 64
# Around the length of a chunk, and segments that end in one.
LENGTHS = [1, 2, 3, 63, 64, 65, 300, 14]
Kernel = Callable[..., tuple[torch.Tensor, object]]


def call(kernel: Kernel, inputs: Sequence[torch.Tensor], **arguments: object) -> list[torch.Tensor]:
    """The output and the gradients of all inputs, on the CPU in fp32."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=leaves[0].device)
    output, _ = kernel(*leaves, initial_state=None, output_final_state=False, cu_seqlens=bounds, **arguments)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    (output * weight).sum().backward()
    return [x.detach().float().cpu() for x in (output, *(x.grad for x in leaves if x.grad is not None))]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    """Some roundings to bf16 apart, each of 2^-9 at most."""
    errors = [relative_error(mine, right) for mine, right in zip(found, expected, strict=True)]
    print(f"{what}, output and gradients: errors {', '.join(f'{error:.1e}' for error in errors)}")
    assert all(error < 2e-2 for error in errors)


def test_the_gated_delta_rule_of_a_pack() -> None:
    from megatron.core.ssm.gated_delta_net import gdn

    seed = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, sum(LENGTHS), HEADS, WIDTH, generator=seed) for _ in range(3))
    g, beta = (torch.rand(1, sum(LENGTHS), HEADS, generator=seed) for _ in range(2))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    # Exact in bf16, so that both start from the same values; the decay is fp32, as in the layer.
    rounded = [x.bfloat16() for x in (q, k, v)]
    inputs = [*rounded, -0.1 * g, beta.bfloat16()]
    expected = call(delta_rule.chunk_gated_delta_rule, [x.float() for x in inputs], use_qk_l2norm_in_kernel=False)
    found = call(gdn.chunk_gated_delta_rule, [x.cuda() for x in inputs], use_qk_l2norm_in_kernel=False)
    assert_close(found, expected, "gated delta rule")


def test_the_convolution_of_a_pack() -> None:
    from megatron.core.ssm.gated_delta_net import gdn

    seed = torch.Generator().manual_seed(1)
    x = torch.randn(1, sum(LENGTHS), HEADS * WIDTH, generator=seed).bfloat16()
    weight = torch.randn(HEADS * WIDTH, 4, generator=seed).bfloat16()
    expected = call(delta_rule.causal_conv1d, [x.float(), weight.float()], bias=None, activation="silu")
    found = call(gdn.causal_conv1d, [x.cuda(), weight.cuda()], bias=None, activation="silu")
    assert_close(found, expected, "convolution")


def test_the_norm_of_queries_and_keys() -> None:
    from megatron.core.ssm.gated_delta_net import common

    x = torch.randn(64, HEADS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    error = relative_error(common.l2norm(x.cuda()).float().cpu(), delta_rule.l2norm(x.float()))
    print(f"l2norm: error {error:.1e}")
    assert error < 2e-2
