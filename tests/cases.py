"""Select the cases of a long list that `make test` runs."""

from collections.abc import Sequence
from typing import Any

import pytest


def later(*values: Any) -> Any:
    """A case that only `make test-layouts` runs."""
    return pytest.param(*values, marks=pytest.mark.layouts)


def in_turn(cases: Sequence[tuple[Any, ...]], every: int) -> list[Any]:
    """Each `every`-th case for `make test`, the others for `make test-layouts`."""
    return [later(*case) if index % every else case for index, case in enumerate(cases)]
