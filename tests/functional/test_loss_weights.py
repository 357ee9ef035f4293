"""Packs whose labels have weights: the loss and every gradient are those of transformers, weighted by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.families import find
from tests import reference
from tests.cases import later
from tests.functional import ranks, step_ranks
from tests.functional.parity import PACK_LENGTH, TOLERANCE
from tests.functional.pool import Layout, Pool

WEIGHTS = (0.25, 1.0, 3.0)
LAYOUTS = [
    Layout(tp=2, sp=True, world=2),
    Layout(cp=2, pp=2, world=4),
    later(Layout()),
    later(Layout(pp=2, world=2)),
    later(Layout(cp=2, world=2)),
    later(Layout(tp=2, cp=2, world=4)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_and_gradients_are_those_of_transformers_weighted(pool: Pool, folder: Path, layout: Layout) -> None:
    """Transformers runs once for each weight, with the labels that have it; the sums of the losses are added up."""
    group = [reference.conversation(kind, 60 + seed) for seed, kind in enumerate(("image", "text", "video"))]
    chance = torch.Generator().manual_seed(3)
    classes = [torch.randint(len(WEIGHTS), c.labels.shape, generator=chance) for c in group]
    loss, gradients, count = 0.0, {}, sum(int((c.labels != -100).sum()) for c in group)
    for number, weight in enumerate(WEIGHTS):
        labels = [c.labels.masked_fill(own != number, -100) for c, own in zip(group, classes, strict=True)]
        part = reference.run_transformers(folder, [replace(c, labels=x) for c, x in zip(group, labels, strict=True)])
        share = weight * sum(int((x != -100).sum()) for x in labels) / count
        loss += share * part.loss
        gradients = {name: gradients.get(name, 0) + share * x for name, x in part.gradients.items()}
    weights = torch.tensor(WEIGHTS)[torch.cat(classes)]
    weights = torch.cat((weights, torch.ones(PACK_LENGTH - len(weights))))
    pack = reference.pack(group, PACK_LENGTH) | {"loss_weights": weights}
    results = pool.run(step_ranks.train_step, layout, folder=folder, packs=[pack])
    total, counted = torch.stack([x for r in results if r["tp_rank"] == 0 for x in r["reports"]]).sum(0).tolist()
    assert counted == count
    assert reference.relative_error(total / count, loss) < TOLERANCE
    config = read_config(folder)
    found = find(config).table(config).to_hf(ranks.assemble([r["gradients"] for r in results]))
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert reference.relative_error(found[name], expected) < TOLERANCE, name


def test_a_wrong_weight_is_an_error_on_every_rank(pool: Pool, folder: Path) -> None:
    pack = reference.pack([reference.conversation("text", 60)], PACK_LENGTH)
    good = torch.ones(PACK_LENGTH)
    wrong = {
        "expected float32 [1, 128], found torch.int64 [1, 128]": good.long(),
        "expected float32 [1, 128], found torch.float32 [1, 127]": good[1:],
        "expected numbers above 0, found 0.0 at token 5": good.index_fill(0, torch.tensor([5]), 0.0),
        "found nan at token 0": good.index_fill(0, torch.tensor([0]), float("nan")),
        "found inf at token 0": good.index_fill(0, torch.tensor([0]), float("inf")),
    }
    packs = [pack | {"loss_weights": value} for value in wrong.values()]
    first, second = pool.run(step_ranks.read_each, Layout(tp=2, world=2), folder=folder, packs=packs)
    assert first == second
    for error, phrase in zip(first, wrong, strict=True):
        assert phrase in str(error)
