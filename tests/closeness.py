"""The relative error of a result: the norm of the difference over the norm of the reference, per tensor.

A bound per element would be meaningless: if the terms of a sum cancel, the error of the element depends on their size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

FP32 = 1e-5


def relative_error(found: Any, expected: Any, scale: float | None = None) -> float:
    """The norm of the difference over the norm of `expected` (tensors, lists or numbers), both in fp64.

    If `expected` is zero, only zero matches. `scale` replaces the norm of a reference that is zero up to rounding
    because its terms cancel, such as the gradient of a query that attends to one key: the `norm` of the tensors that it
    is computed from.
    """
    found, expected = (torch.as_tensor(x).detach().cpu().double() for x in (found, expected))
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    size = norm(expected) if scale is None else scale
    difference = norm(found - expected)
    return difference / size if size else (0.0 if difference == 0.0 else math.inf)


def assert_close_in_norm(found: Any, expected: Any, bound: float = FP32, scale: float | None = None) -> None:
    """Assert that the relative error is below `bound`; it never is for NaN."""
    error = relative_error(found, expected, scale)
    assert error < bound, f"relative error {error:.2e}, expected less than {bound:.0e}"


def norm(*tensors: torch.Tensor | Sequence[torch.Tensor]) -> float:
    """The norm of all elements of these tensors, in fp64."""
    return math.hypot(*(float(torch.linalg.vector_norm(x.detach().double())) for x in tensors))
