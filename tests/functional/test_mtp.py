"""Multi-token prediction: every layout offered gives transformers' logits, losses and gradients."""

from pathlib import Path

import pytest
import torch

from megatron_vlbridge import read_config
from tests import mtp_reference, reference
from tests.cases import in_turn, later
from tests.closeness import assert_close_in_norm
from tests.functional import mtp_ranks, ranks
from tests.functional.parity import PACK_LENGTH, measure, tolerance
from tests.functional.pool import Layout, Pool

KINDS: dict[str, dict] = {
    "untied": {},
    "tied": {"tied": True},
    "experts": {"experts": {}},
    "linear": {"linear": {}},
    "linear-experts": {"linear": {}, "experts": {}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mtp")
    return {kind: mtp_reference.write_mtp_checkpoint(folder / kind, **options) for kind, options in KINDS.items()}


def groups() -> list[list[reference.Conversation]]:
    return [
        [reference.conversation(kind, seed) for kind, seed in (("mixed", 2), ("text", 3), ("image", 4))],
        [reference.conversation("text", 5)],
        [reference.conversation(kind, seed) for kind, seed in (("images", 6), ("video", 7))],
        [reference.conversation(kind, seed) for kind, seed in (("image", 8), ("video", 9), ("text", 10))],
    ]


OWN_STAGE = Layout(pp=3, world=3, stages="Ettt|tm|L")
# Beside the rows of the matrix, which has all others with and without multi-token prediction.
EVERYWHERE = [
    Layout(pp=2, world=2, stages="Ett|ttmL"),
    Layout(pp=2, world=2, stages="Etttt|mL"),
    OWN_STAGE,
    Layout(pp=3, world=3, stages="Etttt|m|L"),
]
DENSE = [
    Layout(pp=3, tp=2, sp=True, world=6, stages="Ett|ttm|L"),
    Layout(pp=3, cp=2, world=6, stages="Et|tttm|L"),
    Layout(pp=2, vpp=2, world=2, stages="Et|t|tt|mL"),
]
EXPERTS = [Layout(tp=2, sp=True, pp=3, ep=2, etp=1, world=6, stages="Ettt|tm|L")]
CASES = [(kind, layout) for layout in EVERYWHERE for kind in KINDS]
CASES += [("untied", layout) for layout in DENSE] + [("experts", layout) for layout in EXPERTS]


@pytest.mark.parametrize(("kind", "layout"), in_turn(CASES, 4), ids=str)
def test_packs_equal_separate_conversations(pool: Pool, folders: dict[str, Path], kind: str, layout: Layout) -> None:
    measure(pool, layout, folders[kind], groups()).check()


@pytest.mark.parametrize(
    ("kind", "layout"), [later("tied", Layout(tp=4, sp=True, world=4)), ("untied", OWN_STAGE)], ids=str
)
def test_padded_vocabulary_changes_nothing(pool: Pool, folders: dict[str, Path], kind: str, layout: Layout) -> None:
    measure(pool, layout, folders[kind], groups(), vocab_size=192).check()


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def test_recomputed_layers_change_nothing(pool: Pool, folders: dict[str, Path]) -> None:
    measure(pool, OWN_STAGE, folders["untied"], groups(), **FULL).check()
    measure(pool, OWN_STAGE, folders["untied"], groups(), recompute_granularity="selective").check()


@pytest.mark.parametrize(("options", "expected"), [({}, 1), (FULL, 2), (FULL | {"recompute_method": "block"}, 1)])
def test_the_layer_is_recomputed_as_megatrons_is(
    pool: Pool, folders: dict[str, Path], options: dict, expected: int
) -> None:
    """With the method "block" Megatron recomputes decoder layers alone."""
    pack = reference.pack(groups()[0], PACK_LENGTH)
    assert pool.run(mtp_ranks.layer_runs, Layout(), folder=folders["untied"], pack=pack, **options) == [expected]


@pytest.mark.parametrize(
    "layout",
    [Layout(), later(Layout(tp=2, sp=True, cp=2, world=4)), Layout(pp=3, world=6, stages="Ettt|tm|L")],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mtp_prediction_equals_transformers(
    pool: Pool, folders: dict[str, Path], kind: str, layout: Layout
) -> None:
    expected = mtp_reference.run_transformers(folders[kind], groups())
    bound = tolerance(read_config(folders[kind]))
    packs = [reference.pack(group, PACK_LENGTH) for group in groups()]
    results = pool.run(mtp_ranks.predictions, layout, folder=folders[kind], packs=packs)
    lengths = [[len(c.tokens) for c in group] for group in groups()]
    logits, losses, means, hits = iter(expected.logits), iter(expected.losses), [], 0
    for row, group, segments in zip(ranks.of_packs(results, "logits", layout, lengths), groups(), lengths, strict=True):
        for part, c in zip(row[: sum(segments)].split(segments), group, strict=True):
            wanted = next(logits)
            assert reference.relative_error(part[:-1, : wanted.shape[1]], wanted) < bound, c
            hits += int((wanted.argmax(-1) == c.labels[1:]).sum())
        found = torch.cat([next(losses) for _ in group])
        means.append(found.sum() / sum(int((c.labels[1:] != -100).sum()) for c in group))
    # Megatron's log divides by the micro-batches of a rank.
    mean = torch.stack(means).mean().item()
    for logged in [r["logged"] for r in results if r["logged"]]:
        assert_close_in_norm(logged["loss_values"] * layout.dp / len(packs), mean)
        assert logged["correct_values"] == hits
        assert logged["total_values"] == sum(int((c.labels[1:] != -100).sum()) for group in groups() for c in group)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4, world=4)], ids=str)
def test_the_largest_logit_is_found_over_all_ranks(pool: Pool, layout: Layout) -> None:
    """The lowest id of equal ones, as torch's `argmax`."""
    logits = torch.randint(0, 4, (50, 1, 64), generator=torch.Generator().manual_seed(0)).float()
    for found in pool.run(mtp_ranks.largest, layout, logits=logits):
        assert torch.equal(found, logits.argmax(-1))


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_group_that_leaves_out_a_copy_of_the_embedding_is_rejected(
    pool: Pool, folders: dict[str, Path], kind: str
) -> None:
    """Megatron's default group holds the first and the last stage; another has the MTP layer."""
    answers = pool.run(mtp_ranks.build_error, OWN_STAGE, checkpoint=folders[kind])
    assert all("[0, 1, 2]" in answer if kind == "tied" else "[0, 1]" in answer for answer in answers)
    assert all("get_embedding_ranks" in answer for answer in answers)
    assert pool.run(mtp_ranks.build_error, Layout(pp=2, world=2), checkpoint=folders[kind]) == ["accepted"] * 2
