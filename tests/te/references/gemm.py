"""Matrix products, as cuBLAS has them: of column-major matrices, so that in torch's terms `op(B) @ op(A)`."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.te.references.dtypes import to_torch


def generic_gemm(
    a: torch.Tensor,
    transpose_a: bool,
    b: torch.Tensor,
    transpose_b: bool,
    out: torch.Tensor | None,
    quantizer: None,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_input: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: None,
    comm_type: None,
    extra_output: None,
    bulk_overlap: bool,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
    """`op(b) @ op(a)`, in `out` or added to it (`accumulate`), else in `out_dtype`; leading axes of `b` are kept.

    `bias` is added; with `grad` its gradient, the sum of `b` over its rows, is the second result instead.

    Called by `general_gemm` (cpp_extensions/gemm.py) for linear layers: with the weight `[out, in]` as `a` and
    activations `[..., in]` as `b` (TN) in the forward, output gradients as `b` (NN) for the input's gradient, and
    activations as `a` and output gradients as `b` (NT) for the weight's.
    """
    # Megatron's router gives None for False.
    assert not any((quantizer, comm_overlap, extra_output, bulk_overlap, gelu))
    assert (alpha, beta) == (1.0, 1.0 if accumulate else 0.0)
    value = _product(a.flatten(0, -2), transpose_a, b.flatten(0, -2), transpose_b)
    has_bias = bias is not None and bias.numel() > 0
    bias_grad = b.flatten(0, -2).sum(0).to(bias.dtype) if has_bias and grad else None
    if has_bias and not grad:
        value = value + bias
    if out is not None:
        _put(value, out, accumulate)
        return out, bias_grad, None, None
    value = value if out_dtype is None else value.to(to_torch(out_dtype))
    return value if transpose_b else value.unflatten(0, b.shape[:-1]), bias_grad, None, None


def te_general_grouped_gemm(
    a: Sequence[torch.Tensor],
    transpose_a: bool,
    b: Sequence[torch.Tensor],
    transpose_b: bool,
    out: Sequence[torch.Tensor],
    out_dtype: Any,
    splits: Sequence[int] | None,
    bias: Sequence[torch.Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_input: Sequence[torch.Tensor],
    grad: bool,
    workspaces: Sequence[torch.Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Sequence[torch.Tensor]:
    """`op(b[i]) @ op(a[i])` of each expert i, in `out[i]`, or with `single_output` in the i-th split of `out[0]`.

    `bias[i]` (empty: none) is added, or with `grad` filled with its gradient. An expert without tokens has a product of
    zeros. Gives `bias`.

    Called by `general_grouped_gemm` (cpp_extensions/gemm.py) for `GroupedLinear`, as `generic_gemm` is for one layer.
    """
    outputs = out[0].split(list(splits)) if single_output else out
    for a_i, b_i, out_i, bias_i in zip(a, b, outputs, bias, strict=True):
        value = _product(a_i, transpose_a, b_i, transpose_b)
        if bias_i.numel() and grad:
            bias_i.copy_(b_i.sum(0))
        elif bias_i.numel():
            value = value + bias_i
        _put(value, out_i, accumulate)
    return bias


def _product(a: torch.Tensor, transpose_a: bool, b: torch.Tensor, transpose_b: bool) -> torch.Tensor:
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    return (b.t() if transpose_b else b) @ (a.t() if transpose_a else a)


def _put(value: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    assert value.shape == out.flatten(0, -2).shape, (value.shape, out.shape)
    if accumulate:
        out.add_(value.view_as(out))
    else:
        out.copy_(value.view_as(out))
