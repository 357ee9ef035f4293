"""Every layout offered gives transformers' logits, loss and gradients."""

from pathlib import Path

import pytest

from tests import reference
from tests.functional.parity import KINDS, measure
from tests.functional.pool import Layout, Pool


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")


def compare(
    pool: Pool, layout: Layout, folder: Path, groups: list[list[reference.Conversation]], **overrides: object
) -> None:
    """Packs of these conversations under `layout` equal transformers, conversation by conversation."""
    measure(pool, layout, folder, groups, **overrides).check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_equals_transformers(pool: Pool, folder: Path, kind: str) -> None:
    compare(pool, Layout(), folder, [[reference.conversation(each, seed) for seed, each in enumerate(KINDS[kind], 1)]])


LAYOUTS = [
    Layout(),
    Layout(tp=2, world=2),
    Layout(tp=2, sp=True, world=2),
    Layout(tp=4, world=4),
    Layout(tp=4, sp=True, world=4),
    Layout(pp=2, world=2),
    Layout(world=2),
    Layout(tp=2, pp=2, world=4),
    Layout(tp=2, pp=2, sp=True, world=4),
    Layout(tp=2, sp=True, world=4),
    Layout(pp=2, world=4),
    Layout(cp=2, world=2),
    Layout(cp=4, world=4),
    Layout(cp=2, world=4),
    Layout(tp=2, cp=2, world=4),
    Layout(tp=2, sp=True, cp=2, world=4),
    Layout(pp=2, cp=2, world=4),
    Layout(tp=2, sp=True, pp=2, cp=2, world=8),
]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, world=2), Layout(tp=4, sp=True, world=4)], ids=str)
def test_padded_vocabulary_changes_nothing(pool: Pool, folder: Path, layout: Layout) -> None:
    groups = [[reference.conversation("image", 11), reference.conversation("text", 12)]]
    compare(pool, layout, folder, groups, vocab_size=192)


def groups() -> list[list[reference.Conversation]]:
    return [
        [reference.conversation(kind, seed) for kind, seed in (("mixed", 2), ("text", 3), ("image", 4))],
        [reference.conversation(kind, seed) for kind, seed in (("text", 5),)],
        [reference.conversation(kind, seed) for kind, seed in (("images", 6), ("video", 7))],
        [reference.conversation(kind, seed) for kind, seed in (("image", 8), ("video", 9), ("text", 10))],
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packs_equal_separate_conversations(pool: Pool, folder: Path, layout: Layout) -> None:
    compare(pool, layout, folder, groups())


@pytest.mark.parametrize("layout", [Layout(cp=2, world=2), Layout(tp=2, sp=True, cp=2, world=4)], ids=str)
def test_the_tower_on_every_context_parallel_rank(pool: Pool, folder: Path, layout: Layout) -> None:
    compare(pool, layout, folder, groups(), balance_vision=False)


def test_three_stages(pool: Pool, folder: Path) -> None:
    """The first stage holds the two layers that take deepstack features, the middle one has neither end."""
    compare(pool, Layout(pp=3, world=3), folder, groups(), num_layers_in_first_pipeline_stage=2)
