"""Copies of the word embedding on several pipeline stages stay one tensor in training."""

from pathlib import Path

import pytest
import torch

from tests import mtp_reference, reference
from tests.functional import copies_ranks
from tests.functional.pool import Layout, Pool

STEPS = 2
OWN_STAGE = Layout(pp=3, world=3, stages="Ettt|tm|L")
# How many copies there are: at the first stage, with the prediction layer, and as the head where it is tied.
CASES = [
    ("tied", Layout(pp=2, world=2), 2),
    ("tied", Layout(pp=2, vpp=2, world=2), 2),
    ("mtp-tied", OWN_STAGE, 3),
    ("mtp", OWN_STAGE, 2),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("copies")
    return {
        "tied": reference.write_checkpoint(folder / "tied", tied=True),
        "mtp": mtp_reference.write_mtp_checkpoint(folder / "mtp"),
        "mtp-tied": mtp_reference.write_mtp_checkpoint(folder / "mtp-tied", tied=True),
    }


@pytest.mark.parametrize(("kind", "layout", "count"), CASES, ids=str)
def test_copies_start_equal_get_the_summed_gradient_and_stay_equal(
    pool: Pool, folders: dict[str, Path], kind: str, layout: Layout, count: int
) -> None:
    packs = [reference.pack([reference.conversation(kind, seed)], 96) for seed, kind in enumerate(("mixed", "text"), 2)]
    results = pool.run(copies_ranks.train, layout, folder=folders[kind], packs=packs, steps=STEPS)

    def copies(key: str, step: int) -> list[torch.Tensor]:
        return [copy for rank in results for copy in rank[key][step]]

    for step in range(STEPS + 1):
        first, *others = copies("weights", step)
        assert len(others) == count - 1
        assert all(torch.equal(first, other) for other in others), f"copies differ after {step} steps"
        assert first.any()
        assert step == 0 or not torch.equal(first, copies("weights", step - 1)[0]), f"step {step} moved nothing"
    for step in range(STEPS):
        parts = copies("parts", step)
        assert all(part.any() for part in parts), "a copy without a gradient of its own proves nothing"
        expected = sum(parts) / results[0]["tokens"][step]
        for gradient in copies("gradients", step):
            assert reference.relative_error(gradient, expected) < 1e-6
