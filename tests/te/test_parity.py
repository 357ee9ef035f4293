"""The TE backend equals transformers in every dimension of a layout, as far as Python goes: kernels are references."""

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.functional import matrix
from tests.functional.kinds import KINDS
from tests.functional.parity import DELTA_RULE, PACK_LENGTH, TOLERANCE
from tests.functional.pool import Layout, Pool
from tests.functional.write_layouts import PAGE
from tests.te import models
from tests.te.rows import ROWS, Row, measure
from tests.te.write_layouts import HEADING, first_cells

# What a step calls of Transformer Engine's extension, but for questions about its libraries.
DENSE = {
    "layernorm_fwd",
    "layernorm_bwd",
    "rmsnorm_fwd",
    "rmsnorm_bwd",
    "generic_gemm",
    "fused_attn_fwd",
    "fused_attn_bwd",
}
EXPERTS = DENSE | {"te_general_grouped_gemm"}
# And of flash-linear-attention.
LINEAR = DENSE | {"l2norm", "causal_conv1d", "chunk_gated_delta_rule"}
P2P = {
    "thd_read_half_tensor",
    "thd_second_half_lse_correction",
    "thd_out_correction",
    "thd_read_second_half_lse",
    "thd_grad_correction",
}
A2A = {"thd_cp_rank_order_to_sequence_order", "thd_sequence_order_to_cp_rank_order"}
ALL_GATHER = A2A | {"thd_copy_valid_tokens_from_per_split_to_rank_local"}

FEWER = [row for row in ROWS if not row.further]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, bool], Path]:
    return matrix.write_folders(tmp_path_factory.mktemp("checkpoints"), {row.kind for row in ROWS})


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.layouts] * row.further, id=str(row)) for row in ROWS]
)
def test_a_layout_equals_transformers(pool: Pool, folders: dict[tuple[str, bool, bool], Path], row: Row) -> None:
    measure(pool, row, folders).check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_that_the_cpu_backends_rows_combine_is_in_a_row(kind: str) -> None:
    on_cpu = _pairs(
        matrix.dimensions(layout, v) for layout in matrix.layouts(kind) for v in matrix.variants(kind, layout)
    )
    assert _pairs(matrix.dimensions(row.layout, row.variant) for row in ROWS if row.kind == kind) == on_cpu


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_every_pair_and_setting_is_in_a_row_of_make_test_te(kind: str) -> None:
    """Of the kinds with linear attention it runs a few rows."""
    every, fewer = ([row for row in rows if row.kind == kind] for rows in (ROWS, FEWER))
    pairs = [_pairs(matrix.dimensions(row.layout, row.variant) for row in rows) for rows in (every, fewer)]
    assert pairs[0] == pairs[1]
    assert {row.setting for row in fewer} == {row.setting for row in every}


def _pairs(rows: Iterable[set[str]]) -> set[frozenset[str]]:
    return {frozenset(pair) for names in rows for pair in combinations(sorted(names), 2)}


def test_the_page_of_layouts_has_every_row_and_no_other() -> None:
    _, _, section = PAGE.read_text().partition(HEADING)
    table = section.split("|\n\n")[0].split("\n\n")[-1].splitlines()[2:]
    assert len(table) == len(ROWS)
    for line, row in zip(table, ROWS, strict=True):
        assert line.startswith(first_cells(row))
        figures = [float(cell) for cell in line.removeprefix(first_cells(row)).split("|")[:3]]
        assert max(figures) < (DELTA_RULE if row.kind.startswith("linear") else TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "layout", "options", "expected"),
    [
        ("dense", Layout(), {}, DENSE),
        ("experts", Layout(), {}, EXPERTS),
        ("linear", Layout(), {}, LINEAR),
        ("dense", Layout(cp=2, world=2), {"cp_comm_type": "p2p"}, DENSE | P2P),
        ("dense", Layout(cp=2, world=2), {"cp_comm_type": "a2a"}, DENSE | A2A),
        ("dense", Layout(cp=2, world=2), {"cp_comm_type": "all_gather"}, DENSE | ALL_GATHER),
    ],
    ids=["dense", "experts", "linear", "p2p", "a2a", "all_gather"],
)
def test_the_step_runs_transformer_engines_functions(
    pool: Pool,
    folders: dict[tuple[str, bool, bool], Path],
    kind: str,
    layout: Layout,
    options: dict[str, Any],
    expected: set[str],
) -> None:
    """Else the CPU backend's kernels, or Transformer Engine's unfused attention, might have been compared."""
    packs = [reference.pack(group, PACK_LENGTH) for group in matrix.groups()]
    called = pool.run(models.called, layout, folder=folders[kind, False, False], packs=packs, **options)
    assert set.union(*called) == expected
