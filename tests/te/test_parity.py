"""The TE backend equals transformers in every dimension of a layout, as far as Python goes: kernels are references."""

from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.functional import matrix
from tests.functional.parity import PACK_LENGTH, measure
from tests.functional.pool import Layout, Pool
from tests.mtp_reference import write_mtp_checkpoint
from tests.te import models

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}

CASES: list[tuple[str, Layout, dict[str, Any]]] = [
    ("dense", Layout(), {}),
    ("dense", Layout(), SELECTIVE),
    ("dense", Layout(world=2), {}),
    ("dense", Layout(tp=2, sp=True, world=2), FULL),
    ("tied", Layout(tp=2, sp=True, world=2), {}),
    ("dense", Layout(pp=2, world=2), {}),
    ("dense", Layout(pp=2, vpp=2, world=2), {}),
    ("dense", Layout(cp=2, world=2), {}),
    ("dense", Layout(cp=2, world=2), {"cp_comm_type": "a2a"}),
    ("dense", Layout(cp=2, world=2), {"cp_comm_type": "all_gather"}),
    ("dense", Layout(cp=4, world=4), {}),
    ("dense", Layout(tp=2, sp=True, cp=2, world=4), FULL),
    ("experts", Layout(), FULL),
    ("experts", Layout(ep=2, world=2), {}),
    ("experts", Layout(tp=2, sp=True, etp=2, world=2), {}),
    ("experts", Layout(tp=2, sp=True, ep=2, etp=1, world=2), FULL),
    ("experts", Layout(tp=2, sp=True, ep=2, etp=2, world=4), {}),
    ("experts", Layout(cp=2, ep=2, world=2), {}),
    ("dense-mtp", Layout(tp=2, sp=True, world=2), {}),
    ("dense-mtp", Layout(cp=2, world=2), {}),
    ("experts-mtp", Layout(ep=2, world=2), {}),
]

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
P2P = {
    "thd_read_half_tensor",
    "thd_second_half_lse_correction",
    "thd_out_correction",
    "thd_read_second_half_lse",
    "thd_grad_correction",
}
A2A = {"thd_cp_rank_order_to_sequence_order", "thd_sequence_order_to_cp_rank_order"}
ALL_GATHER = A2A | {"thd_copy_valid_tokens_from_per_split_to_rank_local"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "dense": reference.write_checkpoint(folder / "dense"),
        "tied": reference.write_checkpoint(folder / "tied", tied=True),
        "experts": reference.write_checkpoint(folder / "experts", experts={}),
        "dense-mtp": write_mtp_checkpoint(folder / "dense-mtp"),
        "experts-mtp": write_mtp_checkpoint(folder / "experts-mtp", experts={}, tied=True),
    }


def name(value: object) -> str | None:
    return "-".join(map(str, value.values())) or "plain" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("kind", "layout", "options"), CASES, ids=name)
def test_a_layout_equals_transformers(
    pool: Pool, folders: dict[str, Path], kind: str, layout: Layout, options: dict[str, Any]
) -> None:
    measure(pool, layout, folders[kind], matrix.groups(), **options).check()


@pytest.mark.parametrize(
    ("kind", "layout", "options", "expected"),
    [
        ("dense", Layout(), {}, DENSE),
        ("experts", Layout(), {}, EXPERTS),
        ("dense", Layout(cp=2, world=2), {"cp_comm_type": "p2p"}, DENSE | P2P),
        ("dense", Layout(cp=2, world=2), {"cp_comm_type": "a2a"}, DENSE | A2A),
        ("dense", Layout(cp=2, world=2), {"cp_comm_type": "all_gather"}, DENSE | ALL_GATHER),
    ],
    ids=["dense", "experts", "p2p", "a2a", "all_gather"],
)
def test_the_step_runs_transformer_engines_functions(
    pool: Pool, folders: dict[str, Path], kind: str, layout: Layout, options: dict[str, Any], expected: set[str]
) -> None:
    """Else the CPU backend's kernels, or Transformer Engine's unfused attention, might have been compared."""
    packs = [reference.pack(group, PACK_LENGTH) for group in matrix.groups()]
    called = pool.run(models.called, layout, folder=folders[kind], packs=packs, **options)
    assert set.union(*called) == expected
