"""Select the cases of a long list that `make test` runs."""

from collections.abc import Sequence
from typing import Any

import pytest


def in_turn(cases: Sequence[tuple[Any, ...]], every: int) -> list[Any]:
    """Each `every`-th case for `make test`, the others for `make test-layouts`."""
    return [
        pytest.param(*case, marks=[pytest.mark.layouts] if index % every else []) for index, case in enumerate(cases)
    ]
