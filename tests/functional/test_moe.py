"""Qwen3-VL with experts, in all or some layers, gives transformers' logits, loss and gradients."""

from pathlib import Path

import pytest

from tests import reference
from tests.functional import matrix
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


@pytest.mark.parametrize("layout", [Layout(), Layout(ep=2, pp=2, world=4)], ids=str)
def test_layers_without_experts(pool: Pool, mixed_folder: Path, layout: Layout) -> None:
    measure(pool, layout, mixed_folder, matrix.groups()).check()
