"""The calls of other frameworks give transformers' token losses and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlbridge.config import read_config
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertForm
from tests import reference
from tests.cases import later
from tests.closeness import relative_error
from tests.functional import call_ranks, ranks
from tests.functional.parity import tolerance
from tests.functional.pool import Layout, Pool

ONE, TP2, TP2_SP = Layout(), Layout(tp=2, world=2), Layout(tp=2, sp=True, world=2)
CP2, PP2 = Layout(cp=2, world=2), Layout(pp=2, world=2)
TP2_SP_CP2 = Layout(tp=2, sp=True, cp=2, world=4)
TP2_SP_PP2 = Layout(tp=2, sp=True, pp=2, world=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("moe"), experts={})


def conversations() -> list[reference.Conversation]:
    return [reference.conversation(kind, seed) for seed, kind in enumerate(("text", "image", "video", "mixed"), 1)]


def errors(found: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Of the token losses and of every gradient."""
    expected, config = reference.run_transformers(folder, conversations()), read_config(folder)
    wanted = torch.cat([x * (c.labels != -100) for x, c in zip(expected.losses, conversations(), strict=True)])
    losses, counts = torch.zeros_like(wanted), torch.zeros(len(wanted), dtype=torch.int64)
    for rank in found:
        for mine, owner in rank["found"] if rank["tp_rank"] == 0 else ():
            assert len(mine) == len(owner)
            kept = owner >= 0
            losses[owner[kept]] = mine[kept]
            counts[owner[kept]] += 1
    assert bool((counts == 1).all())
    table = find(config).table(config, ExpertForm.FUSED_OUT_IN)
    gradients = table.to_hf(ranks.assemble([rank["gradients"] for rank in found]))
    result = {name: relative_error(gradients[name], x) for name, x in expected.gradients.items()}
    return result | {"token losses": relative_error(losses, wanted)}


CASES = [
    (ONE, "verl_thd"),
    (ONE, "nemo_rl"),
    (ONE, "roll"),
    (ONE, "slime"),
    (ONE, "verl_bshd"),
    (ONE, "sky_rl"),
    (ONE, "megatron_bridge"),
    (TP2_SP, "verl_thd"),
    (PP2, "sky_rl"),
    (CP2, "slime"),
    (TP2_SP_CP2, "verl_thd"),
    (TP2_SP_CP2, "megatron_bridge"),
]
LATER = [
    (layout, name)
    for layout in (TP2, TP2_SP, CP2, PP2, TP2_SP_CP2, TP2_SP_PP2, Layout(pp=2, cp=2, world=4))
    for name in call_ranks.CALLS
    if (layout, name) not in CASES
]


@pytest.mark.parametrize(("layout", "name"), [*CASES, *(pytest.param(*x, marks=pytest.mark.layouts) for x in LATER)])
def test_a_call_equals_separate_conversations(pool: Pool, folder: Path, layout: Layout, name: str) -> None:
    found = pool.run(call_ranks.run, layout, folder=folder, name=name, conversations=conversations())
    worst = {what: error for what, error in errors(found, folder).items() if not error < tolerance(read_config(folder))}
    assert not worst


@pytest.mark.parametrize("name", ["verl_thd", *map(later, ("slime", "verl_bshd", "megatron_bridge"))])
def test_a_call_with_experts(pool: Pool, moe_folder: Path, name: str) -> None:
    layout = Layout(ep=2, world=2)
    found = pool.run(call_ranks.run, layout, folder=moe_folder, name=name, conversations=conversations())
    bound = tolerance(read_config(moe_folder))
    assert not {what: error for what, error in errors(found, moe_folder).items() if not error < bound}
