"""verl's own forward functions on a model that it builds through mbridge: transformers' log-probs and gradients."""

from pathlib import Path

import pytest

from tests import reference
from tests.frameworks import verl_ranks
from tests.functional.pool import Layout, Pool
from tests.functional.test_calls import assert_small, conversations, errors

DENSE = [
    Layout(),
    Layout(tp=2, sp=True, world=2),
    Layout(cp=2, world=2),
    Layout(pp=2, world=2),
    Layout(pp=2, vpp=2, world=2),
    Layout(tp=2, sp=True, cp=2, world=4),
]
EXPERTS = [Layout(), Layout(ep=2, world=2)]
FORMS = ["engine-thd", "engine-bshd", "legacy-thd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("experts"), experts={})


def measure(pool: Pool, layout: Layout, folder: Path, form: str) -> dict[str, float]:
    """The errors of the token losses, minus the log-probs, and of each gradient. All ranks run the same batch."""
    found = pool.run(verl_ranks.run, layout, folder=folder, form=form, conversations=conversations())
    return errors(found, folder, copies=layout.dp * layout.cp)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", DENSE, ids=str)
def test_log_probs_and_gradients(pool: Pool, folder: Path, layout: Layout, form: str) -> None:
    assert_small(measure(pool, layout, folder, form), folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", EXPERTS, ids=str)
def test_log_probs_and_gradients_with_experts(pool: Pool, moe_folder: Path, layout: Layout, form: str) -> None:
    assert_small(measure(pool, layout, moe_folder, form), moe_folder)


def test_the_older_workers_without_packing(pool: Pool, folder: Path) -> None:
    assert_small(measure(pool, Layout(tp=2, sp=True, world=2), folder, "legacy-bshd"), folder)
