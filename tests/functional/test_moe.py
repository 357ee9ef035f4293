"""Qwen3-VL with experts: every layout offered gives transformers' logits, loss and gradients."""

from pathlib import Path

import pytest

from tests import reference
from tests.functional.parity import KINDS, measure
from tests.functional.pool import Layout, Pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("moe"), experts={})


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some layers without experts."""
    return reference.write_checkpoint(tmp_path_factory.mktemp("mixed"), experts={"mlp_only_layers": [1]})


@pytest.mark.parametrize("kind", ["text", "images and videos mixed"])
def test_every_kind_of_input_equals_transformers(pool: Pool, folder: Path, kind: str) -> None:
    group = [reference.conversation(each, seed) for seed, each in enumerate(KINDS[kind], 1)]
    measure(pool, Layout(), folder, [group]).check()


LAYOUTS = [
    Layout(tp=2, sp=True, world=2),
    Layout(pp=2, world=2),
    Layout(cp=2, world=2),
    Layout(ep=2, world=2),
    Layout(ep=4, world=4),
    Layout(ep=2, pp=2, world=4),
    Layout(ep=2, tp=2, sp=True, etp=1, world=4),
    Layout(ep=2, tp=2, sp=True, etp=2, world=4),
    Layout(ep=2, cp=2, world=4),
    Layout(ep=2, world=4),
    Layout(ep=4, pp=2, world=8),
    Layout(tp=2, sp=True, cp=2, ep=2, world=8),
    Layout(tp=2, sp=True, pp=2, ep=2, world=8),
    Layout(ep=2, pp=2, cp=2, world=8),
]


def groups() -> list[list[reference.Conversation]]:
    return [
        [reference.conversation(kind, seed) for kind, seed in (("mixed", 2), ("text", 3), ("image", 4))],
        [reference.conversation("text", 5)],
        [reference.conversation(kind, seed) for kind, seed in (("images", 6), ("video", 7))],
        [reference.conversation(kind, seed) for kind, seed in (("image", 8), ("video", 9), ("text", 10))],
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packs_equal_separate_conversations(pool: Pool, folder: Path, layout: Layout) -> None:
    measure(pool, layout, folder, groups()).check()


@pytest.mark.parametrize("layout", [Layout(), Layout(ep=2, pp=2, world=4)], ids=str)
def test_layers_without_experts(pool: Pool, mixed_folder: Path, layout: Layout) -> None:
    measure(pool, layout, mixed_folder, groups()).check()
