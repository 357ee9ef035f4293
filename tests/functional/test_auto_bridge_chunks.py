"""Chunks of a model outside of Megatron's training loop: built, changed by hooks and wrapped as by its `get_model`."""

from pathlib import Path

import pytest
import torch

from tests import reference
from tests.functional import chunk_ranks
from tests.functional.pool import Layout, Pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize(
    ("layout", "precision"),
    [(Layout(), {}), (Layout(pp=2, vpp=2, world=2), {}), (Layout(pp=2, world=2), {"bf16": True})],
    ids=str,
)
def test_chunks_are_those_of_the_stage(pool: Pool, folder: Path, layout: Layout, precision: dict[str, bool]) -> None:
    for rank, found in enumerate(pool.run(chunk_ranks.wrapped, layout, folder=folder, **precision)):
        assert found["stages"] == found["expected stages"]
        assert found["names"] == found["expected names"]
        assert found["hooks"] == [["Qwen3VLModel"] * layout.vpp, ["2"] * layout.vpp]
        assert found["ddp"] == [True] * layout.vpp
        assert found["halved"] == [bool(precision)] * layout.vpp
        assert found["dtypes"] == {torch.bfloat16 if precision else torch.float32}
        assert found["unbucketed"] == [rank > 0] + [True] * (layout.vpp - 1)
        assert found["missing"] == []
        assert found["trained"] == {"_lora."}


def test_other_sizes_and_hooks_without_modules_are_rejected(pool: Pool, folder: Path) -> None:
    (sizes, hook), _ = pool.run(chunk_ranks.refusals, Layout(tp=2, world=2), folder=folder)
    assert "tensor_model_parallel_size=4, of the process groups 2" in sizes
    assert "hook no_modules: expected a list of modules" in hook
    assert "found dict" in hook
