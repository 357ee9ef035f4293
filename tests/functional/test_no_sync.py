"""Forward and backward of a pack never make the host wait for the device."""

from pathlib import Path

import pytest
import torch

from tests import reference
from tests.functional import sync_ranks
from tests.functional.pool import Layout, Pool

EXPERTS_OF_MEGATRON, OURS = "/megatron/core/transformer/moe/", "/megatron_vlbridge/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("moe"), experts={})


def pack(*kinds: str) -> dict[str, torch.Tensor]:
    return reference.pack([reference.conversation(kind, seed) for seed, kind in enumerate(kinds, 2)], 160)


@pytest.mark.parametrize("kinds", [("mixed", "text", "image", "video"), ("text", "text")], ids=" ".join)
def test_no_number_is_asked_of_the_device(pool: Pool, folder: Path, kinds: tuple[str, ...]) -> None:
    """On a device without numbers: no question, no copy that waits, no operation that copies in secret."""
    (asked,) = pool.run(sync_ranks.questions_without_numbers, Layout(), folder=folder, pack=pack(*kinds))
    assert not asked


LAYOUTS = [
    (Layout(), {}),
    (Layout(), {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    (Layout(cp=2, world=2), {}),
    (Layout(tp=2, sp=True, world=2), {}),
]


@pytest.mark.parametrize(("layout", "options"), LAYOUTS, ids=lambda x: str(x) if isinstance(x, Layout) else "-".join(x))
def test_nothing_is_asked_under_parallel_layouts(
    pool: Pool, folder: Path, layout: Layout, options: dict[str, object]
) -> None:
    for asked in pool.run(
        sync_ranks.questions, layout, folder=folder, pack=pack("mixed", "text", "image", "video"), **options
    ):
        assert not asked


def test_with_experts_only_their_dispatch_asks(pool: Pool, moe_folder: Path) -> None:
    """Megatron-Core's alltoall dispatcher and its experts on the CPU have to know how many tokens each expert gets."""
    (asked,) = pool.run(sync_ranks.questions, Layout(), folder=moe_folder, pack=pack("mixed", "text", "image", "video"))
    ours = [(what, lines) for what, lines in asked if not lines or OURS in lines[0] or not _among_experts(lines)]
    assert not ours
    assert len(ours) < len(asked), "the dispatcher asks nothing any more: compare with none at all"


def _among_experts(lines: list[str]) -> bool:
    return any(EXPERTS_OF_MEGATRON in line for line in lines)
