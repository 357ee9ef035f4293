"""The relative error by which all results are compared."""

import math

import pytest
import torch

from tests.closeness import assert_close_in_norm, norm, relative_error


def test_the_norm_of_the_difference_over_the_norm_of_the_reference():
    assert relative_error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert relative_error(torch.tensor([[30.0, 45.0]]), [[30.0, 40.0]]) == pytest.approx(0.1)
    assert relative_error(1.5, 1.0) == 0.5
    assert relative_error([0.0, 0.5], [0.0, 0.0], norm(torch.tensor([3.0]), torch.tensor([4.0]))) == 0.1


def test_the_error_of_one_element_is_relative_to_the_norm_of_the_whole_tensor():
    expected = torch.ones(10_000)
    found = expected.clone()
    found[0] += 0.1
    assert relative_error(found, expected) == pytest.approx(1e-3)


def test_only_zero_matches_a_zero_reference():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.tensor([0.0, 1e-30, 0.0]), torch.zeros(3)) == math.inf


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1.1])
def test_nan_and_infinity_are_never_close(wrong):
    with pytest.raises(AssertionError, match="relative error"):
        assert_close_in_norm([1.0, wrong], [1.0, 1.0])
    with pytest.raises(AssertionError, match="shape"):
        assert_close_in_norm([1.0], [1.0, 1.0])


def test_a_difference_below_fp32_is_detected():
    assert relative_error(torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0 + 1e-12, dtype=torch.float64)) > 0
