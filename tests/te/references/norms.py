"""LayerNorm and RMSNorm, forward and backward."""

from typing import Any

import torch

from tests.te.references.dtypes import to_torch


def layernorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    quantizer: None,
    dtype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm of each row of `x` `[R, H]`: the result in `dtype`, the rows' means `[R]`, inverse deviations `[R]`.

    Called by `apply_normalization` (module/_common.py) for `LayerNormLinear`, and by `ops.LayerNorm`.
    """
    assert weight.shape == bias.shape == x.shape[1:], (x.shape, weight.shape, bias.shape)
    mean = x.float().mean(1)
    scale = (x.float().var(1, correction=0) + eps).rsqrt()
    normal = (x.float() - mean[:, None]) * scale[:, None]
    y = normal * _gamma(weight, zero_centered_gamma) + bias.float()
    return _result(y, out, quantizer, dtype), mean, scale


def layernorm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x` `[R, H]`, `weight` `[H]` and `bias` `[H]`; `mean`, `scale` are the forward's.

    Called by the backward of `LayerNormLinear` and of `ops.LayerNorm`.
    """
    normal = (x.float() - mean[:, None]) * scale[:, None]
    of_normal = _grad_of_normal(grad, x, weight, zero_centered_gamma)
    centered = of_normal - of_normal.mean(1, keepdim=True)
    of_x = scale[:, None] * (centered - normal * (of_normal * normal).mean(1, keepdim=True))
    of_weight, of_bias = (grad.float() * normal).sum(0), grad.float().sum(0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype)


def rmsnorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    quantizer: None,
    dtype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """RMSNorm of each row of `x` `[R, H]`: the result in `dtype`, nothing, and the rows' inverse norms `[R]`.

    Called by `apply_normalization` (module/_common.py) for `LayerNormLinear`, and by `ops.RMSNorm`; for the heads'
    norms of queries and keys a row is a head.
    """
    assert weight.shape == x.shape[1:], (x.shape, weight.shape)
    scale = (x.float().square().mean(1) + eps).rsqrt()
    y = x.float() * scale[:, None] * _gamma(weight, zero_centered_gamma)
    return _result(y, out, quantizer, dtype), None, scale


def rmsnorm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `x` `[R, H]` and `weight` `[H]`; `scale` is the forward's.

    Called by the backward of `LayerNormLinear` and of `ops.RMSNorm`.
    """
    normal = x.float() * scale[:, None]
    of_normal = _grad_of_normal(grad, x, weight, zero_centered_gamma)
    of_x = scale[:, None] * (of_normal - normal * (of_normal * normal).mean(1, keepdim=True))
    return of_x.to(x.dtype), (grad.float() * normal).sum(0).to(weight.dtype)


def _gamma(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def _grad_of_normal(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    assert grad.shape == x.shape, (grad.shape, x.shape)
    return grad.float() * _gamma(weight, zero_centered)


def _result(y: torch.Tensor, out: torch.Tensor | None, quantizer: None, dtype: Any) -> torch.Tensor:
    assert quantizer is None, "no reference for FP8"
    y = y.to(to_torch(dtype))
    return y if out is None else out.copy_(y)
