"""Every layout offered gives transformers' logits, loss and gradients."""

from pathlib import Path

import pytest

from tests import reference
from tests.functional.parity import KINDS, measure
from tests.functional.pool import Layout, Pool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: reference.write_checkpoint(tmp_path_factory.mktemp(kind), tied=kind == "tied")
        for kind in ("untied", "tied")
    }


def compare(
    pool: Pool, layout: Layout, folder: Path, groups: list[list[reference.Conversation]], **overrides: object
) -> None:
    """Packs of these conversations under `layout` equal transformers, conversation by conversation."""
    measure(pool, layout, folder, groups, **overrides).check()


@pytest.mark.parametrize("ends", ["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_equals_transformers(pool: Pool, folders: dict[str, Path], kind: str, ends: str) -> None:
    compare(
        pool,
        Layout(),
        folders[ends],
        [[reference.conversation(each, seed) for seed, each in enumerate(KINDS[kind], 1)]],
    )


# Tied or not matters where both ends of the model are, and how they are split.
TIED_LAYOUTS = [
    Layout(tp=4, sp=True, world=4),
    Layout(pp=2, world=2),
    Layout(tp=2, pp=2, sp=True, world=4),
    Layout(pp=2, cp=2, world=4),
]
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


CASES = [("untied", layout) for layout in LAYOUTS] + [("tied", layout) for layout in TIED_LAYOUTS]


def groups() -> list[list[reference.Conversation]]:
    return [
        [reference.conversation(kind, seed) for kind, seed in (("mixed", 2), ("text", 3), ("image", 4))],
        [reference.conversation(kind, seed) for kind, seed in (("text", 5),)],
        [reference.conversation(kind, seed) for kind, seed in (("images", 6), ("video", 7))],
        [reference.conversation(kind, seed) for kind, seed in (("image", 8), ("video", 9), ("text", 10))],
    ]


@pytest.mark.parametrize(("ends", "layout"), CASES, ids=str)
def test_packs_equal_separate_conversations(pool: Pool, folders: dict[str, Path], ends: str, layout: Layout) -> None:
    compare(pool, layout, folders[ends], groups())


@pytest.mark.parametrize(("ends", "layout"), [("tied", Layout()), ("untied", Layout(tp=4, sp=True, world=4))], ids=str)
def test_padded_vocabulary_changes_nothing(pool: Pool, folders: dict[str, Path], ends: str, layout: Layout) -> None:
    compare(pool, layout, folders[ends], groups(), vocab_size=192)


@pytest.mark.parametrize("layout", [Layout(cp=2, world=2), Layout(tp=2, sp=True, cp=2, world=4)], ids=str)
def test_the_tower_on_every_context_parallel_rank(pool: Pool, folders: dict[str, Path], layout: Layout) -> None:
    compare(pool, layout, folders["untied"], groups(), balance_vision=False)


def test_recomputed_layers_under_pipeline_and_context_parallel(pool: Pool, folders: dict[str, Path]) -> None:
    layout = Layout(pp=2, cp=2, world=4)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    compare(pool, layout, folders["untied"], groups(), **recompute)


def test_three_stages(pool: Pool, folders: dict[str, Path]) -> None:
    """The first stage holds the two layers that take deepstack features, the middle one has neither end."""
    compare(pool, Layout(pp=3, world=3), folders["tied"], groups(), num_layers_in_first_pipeline_stage=2)
