"""Every layout offered gives transformers' logits, loss and gradients."""

from pathlib import Path

import pytest
import torch

from megatron_vlbridge.config import read_config
from megatron_vlbridge.families import find
from tests import reference
from tests.functional import ranks
from tests.functional.pool import Layout, Pool

TOLERANCE = 1e-5
KINDS = ("text", "image", "images", "video", "mixed")
PACK_LENGTH = 128


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")


def compare(
    pool: Pool, layout: Layout, folder: Path, groups: list[list[reference.Conversation]], **overrides: object
) -> None:
    """Packs of these conversations under `layout` against transformers, conversation by conversation."""
    packs = [reference.pack(group, PACK_LENGTH) for group in groups]
    expected = reference.run_transformers(folder, [c for group in groups for c in group])
    results = pool.run(ranks.forward_backward, layout, folder=folder, packs=packs, **overrides)

    dp_size = layout.world // (layout.tp * layout.pp)
    logits = ranks.gathered_logits(results, dp_size)
    found = [
        x
        for group, row in zip(groups, logits, strict=True)
        for x in row.split([len(c.tokens) for c in group] + [PACK_LENGTH - sum(len(c.tokens) for c in group)])[
            : len(group)
        ]
    ]
    for number, (mine, theirs) in enumerate(zip(found, expected.logits, strict=True)):
        error = reference.relative_error(mine[:, : theirs.shape[1]], theirs)
        assert error < TOLERANCE, f"logits of conversation {number}: {error}"

    last = [r for r in results if r["losses"] and r["tp_rank"] == 0]
    report = torch.stack([x for r in last for x in r["reports"]]).sum(0)
    assert abs(report[0] / report[1] - expected.loss) < TOLERANCE * expected.loss

    config = read_config(folder)
    gradients = find(config).table(config).to_hf(ranks.assemble([r["gradients"] for r in results]))
    assert set(gradients) == set(expected.gradients)
    for name, theirs in expected.gradients.items():
        error = reference.relative_error(gradients[name], theirs)
        assert error < TOLERANCE, f"gradient of {name}: {error}"


@pytest.mark.parametrize("kind", KINDS)
def test_one_conversation_equals_transformers(pool: Pool, folder: Path, kind: str) -> None:
    compare(pool, Layout(), folder, [[reference.conversation(kind, seed=1)]])


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
]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, world=2), Layout(tp=4, sp=True, world=4)], ids=str)
def test_padded_vocabulary_changes_nothing(pool: Pool, folder: Path, layout: Layout) -> None:
    groups = [[reference.conversation("image", 11), reference.conversation("text", 12)]]
    compare(pool, layout, folder, groups, vocab_size=192)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packs_equal_separate_conversations(pool: Pool, folder: Path, layout: Layout) -> None:
    groups = [
        [reference.conversation(kind, seed) for kind, seed in (("mixed", 2), ("text", 3), ("image", 4))],
        [reference.conversation(kind, seed) for kind, seed in (("text", 5),)],
        [reference.conversation(kind, seed) for kind, seed in (("images", 6), ("video", 7))],
        [reference.conversation(kind, seed) for kind, seed in (("image", 8), ("video", 9), ("text", 10))],
    ]
    compare(pool, layout, folder, groups)
