"""Forward and backward of a pack never make the host wait for the device."""

from pathlib import Path

import pytest
import torch

from tests import mtp_reference, reference
from tests.functional import sync_ranks
from tests.functional.pool import Layout, Pool

EXPERTS_OF_MEGATRON, OURS = "/megatron/core/transformer/moe/", "/megatron_vlbridge/"
ROUTER_OF_MEGATRON = f"{EXPERTS_OF_MEGATRON}router.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("moe"), experts={})


@pytest.fixture(scope="module")
def linear_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mtp_reference.write_mtp_checkpoint(tmp_path_factory.mktemp("linear"), linear={})


@pytest.fixture(scope="module")
def mtp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mtp_reference.write_mtp_checkpoint(tmp_path_factory.mktemp("mtp"))


def pack(*kinds: str) -> dict[str, torch.Tensor]:
    return reference.pack([reference.conversation(kind, seed) for seed, kind in enumerate(kinds, 2)], 160)


# Deepstack features travel to the second stage.
STAGES = Layout(pp=2, world=2, stages="Et|tttL")
SELECTIVE = {"recompute_granularity": "selective"}


@pytest.mark.parametrize(
    ("kinds", "layout", "options"),
    [
        (("mixed", "text", "image", "video"), Layout(), {}),
        (("text", "text"), Layout(), {}),
        (("mixed", "text"), Layout(), SELECTIVE),
        (("mixed", "text"), STAGES, {}),
    ],
    ids=str,
)
def test_no_number_is_asked_of_the_device(
    pool: Pool, folder: Path, kinds: tuple[str, ...], layout: Layout, options: dict[str, object]
) -> None:
    """On a device without numbers: no question, no copy that waits, no operation that copies in secret."""
    for asked in pool.run(sync_ranks.questions_without_numbers, layout, folder=folder, pack=pack(*kinds), **options):
        assert not asked


def test_the_prediction_layer_asks_for_no_number(pool: Pool, mtp_folder: Path) -> None:
    (asked,) = pool.run(
        sync_ranks.questions_without_numbers, Layout(), folder=mtp_folder, pack=pack("mixed", "text", "image", "video")
    )
    assert not asked


@pytest.mark.parametrize("options", [{}, SELECTIVE], ids=str)
def test_linear_attention_asks_for_no_number(pool: Pool, linear_folder: Path, options: dict[str, object]) -> None:
    kinds = ("mixed", "text", "image", "video")
    (asked,) = pool.run(
        sync_ranks.questions_without_numbers, Layout(), folder=linear_folder, pack=pack(*kinds), **options
    )
    assert not asked


@pytest.mark.parametrize("layout", [Layout(cp=2, world=2), Layout(tp=2, sp=True, world=2)], ids=str)
def test_linear_attention_asks_nothing_under_parallel_layouts(pool: Pool, linear_folder: Path, layout: Layout) -> None:
    kinds = ("mixed", "text", "image", "video")
    for asked in pool.run(sync_ranks.questions, layout, folder=linear_folder, pack=pack(*kinds)):
        assert not asked


LAYOUTS = [
    (Layout(), {}),
    (Layout(), {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    (Layout(), SELECTIVE),
    (Layout(cp=2, world=2), {}),
    (Layout(tp=2, sp=True, world=2), {}),
    (STAGES, {}),
]


@pytest.mark.parametrize(("layout", "options"), LAYOUTS, ids=lambda x: str(x) if isinstance(x, Layout) else "-".join(x))
def test_nothing_is_asked_under_parallel_layouts(
    pool: Pool, folder: Path, layout: Layout, options: dict[str, object]
) -> None:
    for asked in pool.run(
        sync_ranks.questions, layout, folder=folder, pack=pack("mixed", "text", "image", "video"), **options
    ):
        assert not asked


ROUTER_LOSSES = {
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
}


@pytest.mark.parametrize("options", [{}, ROUTER_LOSSES], ids=["no router loss", "router losses"])
def test_with_experts_only_their_dispatch_asks(pool: Pool, moe_folder: Path, options: dict[str, object]) -> None:
    """Megatron-Core's alltoall dispatcher and its experts on the CPU have to know how many tokens each expert gets."""
    (asked,) = pool.run(
        sync_ranks.questions, Layout(), folder=moe_folder, pack=pack("mixed", "text", "image", "video"), **options
    )
    ours = [(what, lines) for what, lines in asked if not lines or OURS in lines[0] or not _among_experts(lines)]
    assert not ours
    assert len(ours) < len(asked), "the dispatcher asks nothing any more: compare with none at all"
    assert not [(what, lines) for what, lines in asked if any(ROUTER_OF_MEGATRON in line for line in lines)]


def _among_experts(lines: list[str]) -> bool:
    return any(EXPERTS_OF_MEGATRON in line for line in lines)
