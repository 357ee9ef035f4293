"""What would train a model without its images, with wrong positions or on other packs is rejected on all ranks."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.functional import guard_ranks
from tests.functional.pool import Layout, Pool

PP2, CP2, TP2_SP = Layout(pp=2, world=2), Layout(cp=2, world=2), Layout(tp=2, sp=True, world=2)
LENGTH = 96

# Of each sabotage what the error of all ranks has.
NAMED = {
    "forward without images": ("pipeline stage 0 (Qwen3VLModel)", "image", "found 4 of 4", "vision tower"),
    "blank pixels": ("pipeline stage 0 (Wrapper)", "found 4 of 4", "found 8 of 8"),
    "no videos": ("pipeline stage 0 (Wrapper)", "of a video", "found 8 of 8"),
    "swapped pixels": ("pipeline stage 0 (Wrapper)", "got the pixels of others"),
    "swapped videos": ("pipeline stage 0 (Wrapper)", "found 12 more", "got the pixels of others"),
    "features of one token": ("pipeline stage 0", "found 4 of 4"),
    "non-causal": ("pipeline stage 0", "attend to later tokens"),
    "dropped keywords": ("pipeline stage 0 (Wrapper)", "keyword `inputs`", "found none", "pass on all keywords"),
    "dropped keywords later": ("pipeline stage 1 (Wrapper)", "keyword `inputs`", "pass on all keywords"),
    "text positions": ("pipeline stage 1 (Wrapper)", "expected the positions of the pack", "position_ids"),
    "tower on a later stage": ("pipeline stage 1", "on the first stage only", "found visual"),
    "detached tower": ("pipeline stage 0", "path to the loss from every parameter", "vision_model."),
    "unused parameter": ("pipeline stage 1", "path to the loss from every parameter", "extra_head"),
    "detached hidden states": ("pipeline stage 1", "no earlier stage would learn"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("guard"))


def pack(*kinds: str, seed: int = 20) -> dict[str, torch.Tensor]:
    return reference.pack([reference.conversation(kind, seed + index) for index, kind in enumerate(kinds)], LENGTH)


RARE = ("blank pixels", "no videos", "swapped videos", "features of one token", "non-causal", "detached tower")


@pytest.mark.parametrize(
    "sabotages",
    [[name for name in NAMED if name not in RARE], pytest.param(RARE, marks=pytest.mark.layouts)],
    ids=["common", "rare"],
)
def test_a_sabotage_is_the_same_error_on_all_ranks(pool: Pool, folder: Path, sabotages: Sequence[str]) -> None:
    """Also with text alone in the first iteration."""
    packs, options = [pack("text")] * 2, {"seq_length": LENGTH}
    found = pool.run(guard_ranks.train, PP2, folder=folder, packs=packs, sabotages=sabotages, **options)
    assert found[0] == found[1]
    for sabotage, error in zip(sabotages, found[0], strict=True):
        assert error is not None, sabotage
        assert all(part in error for part in NAMED[sabotage]), (sabotage, error)


FINE = ("none", "fused gradient")
ONE_STAGE = ("forward without images", "swapped pixels", "dropped keywords", "detached tower", "text positions")


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        *(
            pytest.param(layout, marks=pytest.mark.layouts)
            for layout in (
                Layout(tp=2, world=2),
                TP2_SP,
                CP2,
                Layout(world=2),
                Layout(tp=2, cp=2, sp=True, world=4),
                Layout(tp=2, pp=2, sp=True, world=4),
            )
        ),
    ],
    ids=str,
)
def test_a_sabotage_of_a_whole_model_is_rejected(pool: Pool, folder: Path, layout: Layout) -> None:
    packs = [pack("text"), pack("image", "text")] * 2
    for rank in pool.run(guard_ranks.train, layout, folder=folder, packs=packs, sabotages=[*FINE, *ONE_STAGE]):
        assert rank[:2] == [None, None]
        for sabotage, error in zip(ONE_STAGE, rank[2:], strict=True):
            assert error is not None, sabotage
            parts = [part if layout.pp > 1 else part.replace("stage 1", "stage 0") for part in NAMED[sabotage]]
            assert all(part in error for part in parts), (sabotage, error)


@pytest.mark.layouts
def test_a_sabotage_of_a_model_chunk_is_rejected(pool: Pool, folder: Path) -> None:
    packs, layout = [pack("text"), pack("image", "text")], Layout(pp=2, vpp=2, world=2)
    sabotages = ["none", "forward without images", "text positions", "unused parameter", "detached hidden states"]
    found = pool.run(guard_ranks.train, layout, folder=folder, packs=packs, sabotages=sabotages)
    assert found[0] == found[1]
    assert found[0][0] is None
    for sabotage, error in zip(sabotages[1:], found[0][1:], strict=True):
        chunk, stage = NAMED[sabotage][0], NAMED[sabotage][0].split(" (")[0]
        where = f"{stage}, model chunk {int(stage.endswith('1'))}"
        assert all(part.replace(stage, where) if part == chunk else part in error for part in NAMED[sabotage])


def test_a_model_is_checked_before_an_evaluation_too(pool: Pool, folder: Path) -> None:
    sabotages = ["none", "forward without images", "text positions", "unused parameter"]
    found = pool.run(guard_ranks.evaluate, Layout(), folder=folder, packs=[pack("text")], sabotages=sabotages)[0]
    assert found[0] == [None] * 3
    assert ["tower" in str(error) for error in found[1]] == [True] * 3
    assert ["positions of the pack" in str(error) for error in found[2]] == [True] * 3
    # Only a backward pass shows it.
    assert ["extra_head" in str(error) for error in found[3]] == [False, False, True]


# Packs out of step


def out_of_step() -> dict[str, tuple[list[dict[str, torch.Tensor]], str]]:
    """Of each kind the last of four packs as each of two ranks reads it, and what the error says that differs."""
    own, other = pack("image", "text"), pack("image", "text", seed=30)
    labels, positions = own["labels"].clone(), torch.zeros(3, LENGTH, dtype=torch.int64)
    labels[labels != -100] = 20
    return {
        "positions": ([own, own | {"position_ids": positions}], "differs in position_ids;"),
        "another seed": ([own, other], "differs in tokens, labels"),
        "another order": ([own, pack("text", "image")], "tokens"),
        "labels": ([own, own | {"labels": labels}], "differs in labels;"),
    }


@pytest.mark.parametrize("layout", [PP2, CP2], ids=str)
def test_packs_out_of_step_are_the_same_error_on_all_ranks(pool: Pool, folder: Path, layout: Layout) -> None:
    """Context-parallel ranks compare before they use a pack, and so one that a rank rejects is an error of all too."""
    first, good = pack("text"), pack("image", "text")
    kinds = list(out_of_step().values())
    runs = [([first, good, first, mine], [first, good, first, theirs]) for (mine, theirs), _ in kinds]
    coordinate, where = "pp", "pipeline stage 1 and pipeline stage 0"
    if layout.cp > 1:
        coordinate, where = "cp", "context-parallel rank 1 and context-parallel rank 0"
        runs = [*runs[:2], ([good, good], [good, good | {"image_grid_thw": good["image_grid_thw"] + 2}])]
    found = pool.run(guard_ranks.train_on, layout, folder=folder, runs=runs, coordinate=coordinate)
    assert found[0] == found[1]
    assert all(before is None for before, _ in found[0])
    for (_, error), (_, part) in zip(found[0], kinds[:2] if layout.cp > 1 else kinds, strict=False):
        assert part in error, error
        assert where in error, error
        assert f"micro-batch {0 if layout.cp > 1 else 1} since" in error
        assert f"{LENGTH} tokens, 2 segments, 1 images, 0 videos" in error
        assert "same files, seed and position" in error
    assert layout.pp > 1 or "image patches" in found[0][2][1]


# The first step


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout(), "experts"),
        pytest.param(PP2, "dense", marks=pytest.mark.layouts),
        pytest.param(CP2, "dense", marks=pytest.mark.layouts),
        pytest.param(TP2_SP, "linear-experts", marks=pytest.mark.layouts),
    ],
    ids=str,
)
def test_the_first_step_is_the_same_bit_for_bit(pool: Pool, tmp_path: Path, layout: Layout, kind: str) -> None:
    """Random numbers and buffers that a forward changes in any mode are restored."""
    folder = reference.write_checkpoint(tmp_path, **reference.KINDS[kind])
    packs = [pack("text"), pack("image", "video")]
    for without, guarded in pool.run(guard_ranks.first_step, layout, folder=folder, packs=packs):
        for key, expected in without.items():
            assert reference_equal(expected, guarded[key]), key


def reference_equal(expected: object, found: object) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(expected, found)
    return len(expected) == len(found) and all(map(reference_equal, expected, found))
