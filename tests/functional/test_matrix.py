"""Layouts, each with one of its variants, give transformers' logits, loss and every gradient.

All layouts that are offered, with all variants: `make test-layouts`.
"""

from pathlib import Path

import pytest

from tests.functional import matrix
from tests.functional.kinds import KINDS
from tests.functional.pool import Layout, Pool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, bool], Path]:
    return matrix.write_folders(tmp_path_factory.mktemp("checkpoints"), KINDS)


@pytest.mark.parametrize(("kind", "layout", "variant"), list(matrix.small_set()), ids=str)
def test_layout_equals_transformers(
    pool: Pool,
    folders: dict[tuple[str, bool, bool], Path],
    kind: str,
    layout: Layout,
    variant: matrix.Variant,
) -> None:
    (errors,) = matrix.run(pool, kind, layout, [variant], folders)
    errors.check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_large_layouts_are_rows(kind: str) -> None:
    small = {layout for each, layout, _ in matrix.small_set() if each == kind}
    assert set(KINDS[kind].large) <= small <= set(matrix.layouts(kind))
