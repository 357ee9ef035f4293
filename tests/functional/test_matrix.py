"""Layouts, each with one of its variants, give transformers' logits, loss and every gradient.

Those of the kinds that have all parts of a model between them: deepstack, experts, linear attention. All layouts of all
kinds, with all variants: `make test-layouts`.
"""

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest

from tests.functional import matrix
from tests.functional.kinds import KINDS
from tests.functional.pool import Layout, Pool

CHOSEN = ("dense", "linear-experts")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, bool], Path]:
    return matrix.write_folders(tmp_path_factory.mktemp("checkpoints"), CHOSEN)


@pytest.mark.parametrize(
    ("kind", "layout", "variant"), [(kind, *row) for kind in CHOSEN for row in KINDS[kind].small], ids=str
)
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
def test_the_small_set_has_every_pair_of_dimensions(kind: str) -> None:
    """With and without each of the two, of what the rows have."""
    small = KINDS[kind].small
    rows = [(layout, variant) for layout in matrix.layouts(kind) for variant in matrix.variants(kind, layout)]
    assert set(small) <= set(rows)
    assert _pairs(small) == _pairs(rows)


def _pairs(rows: Iterable[tuple[Layout, matrix.Variant]]) -> set[tuple[tuple[str, bool], ...]]:
    found = [matrix.dimensions(*row) for row in rows]
    names = sorted(set.union(*found))
    return {pair for used in found for pair in combinations([(name, name in used) for name in names], 2)}
