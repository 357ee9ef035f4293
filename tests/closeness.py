"""How far a result is from its reference: the norm of the difference over the norm of the reference, per tensor.

A bound per element would claim nothing: where sums cancel, one element is as inexact as the terms of its sum are large.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

FP32 = 1e-5


def relative_error(found: Any, expected: Any, scale: float | None = None) -> float:
    """Norm of the difference over that of `expected` (tensors, lists or numbers), both taken in fp64.

    Where `expected` is zero, only zero is right. `scale` replaces the norm of a reference that is zero but for rounding
    because its terms cancel, such as the gradient of a query that sees one key: it is the `norm` of the tensors that
    are computed with it.
    """
    found, expected = (torch.as_tensor(x).detach().cpu().double() for x in (found, expected))
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    size = norm(expected) if scale is None else scale
    difference = norm(found - expected)
    return difference / size if size else (0.0 if difference == 0.0 else math.inf)


def assert_close_in_norm(found: Any, expected: Any, bound: float = FP32, scale: float | None = None) -> None:
    """The relative error is below `bound`; of what is not a number, nothing is."""
    error = relative_error(found, expected, scale)
    assert error < bound, f"relative error {error:.2e}, expected less than {bound:.0e}"


def norm(*tensors: torch.Tensor | Sequence[torch.Tensor]) -> float:
    """The norm of all elements of these tensors, in fp64."""
    return math.hypot(*(float(torch.linalg.vector_norm(x.detach().double())) for x in tensors))
