"""What a run measures: exact counts in every layout, an error on all ranks for a loss that is not finite, no NaN."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.training.log_lines import read_iteration
from megatron_vlbridge.training.metrics.counts import PackCounts
from megatron_vlbridge.training.metrics.csv_file import read_rows
from tests import reference
from tests.functional import metrics_ranks
from tests.functional.parity import PACK_LENGTH
from tests.functional.pool import Layout, Pool

DP2, PP2 = Layout(world=2), Layout(pp=2, world=2)
GROUPS = [
    [("image", "text"), ("text",), ("mixed",), ("images", "video")],
    [("video",), ("text", "text"), ("image", "text"), ("text", "video")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("experts"), experts={})


def conversations(step: int) -> list[list[reference.Conversation]]:
    return [
        [reference.conversation(kind, 10 * step + number) for number, kind in enumerate(kinds)]
        for kinds in GROUPS[step]
    ]


def packs(step: int) -> list[dict[str, torch.Tensor]]:
    return [reference.pack(group, PACK_LENGTH) for group in conversations(step)]


def counted(groups: Sequence[Sequence[reference.Conversation]]) -> PackCounts:
    """One by one, from the conversations."""
    every = [c for group in groups for c in group]
    grids = [grid for c in every for grids in (c.image_grids, c.video_grids) for grid in grids.tolist()]
    return PackCounts(
        packs=len(groups),
        length=len(groups) * PACK_LENGTH,
        tokens=sum(len(c.tokens) for c in every),
        supervised_tokens=sum(label != -100 for c in every for label in c.labels.tolist()),
        images=sum(len(c.image_grids) for c in every),
        videos=sum(len(c.video_grids) for c in every),
        patches=sum(len(c.images) + len(c.videos) for c in every),
        token_pairs=sum(sum(range(1, len(c.tokens) + 1)) for c in every),
        patch_pairs=sum(t * (h * w) ** 2 for t, h, w in grids),
    )


LAYOUTS = [Layout(), Layout(tp=2, cp=2, world=4), PP2, DP2]
MORE = [
    Layout(pp=2, vpp=2, world=2),
    Layout(tp=2, sp=True, pp=2, world=4),
    Layout(pp=2, cp=2, world=4),
    Layout(cp=2, world=4),
    Layout(ep=2, world=2),
    Layout(tp=2, sp=True, ep=2, etp=1, world=4),
]


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.layouts) for layout in MORE)], ids=str
)
def test_each_pack_is_counted_once_in_every_layout(
    pool: Pool, folder: Path, experts: Path, tmp_path: Path, layout: Layout
) -> None:
    """Also where Megatron runs a step again, and where it evaluates between the steps."""
    checkpoint = experts if layout.ep > 1 else folder
    file = tmp_path / "metrics.csv"
    steps = [packs(0), packs(1)]
    expected = Counter[int]()
    for number, pack in enumerate([*steps[0], *steps[1]]):
        pack["replaced_per_source"] = torch.tensor([number, 0, 1])
        expected.update({0: number, 2: 1})
    results = pool.run(metrics_ranks.lines, layout, folder=checkpoint, steps=steps, csv_file=file)
    assert sum((replaced for _, replaced in results), Counter[int]()) == expected
    printed = [lines for lines, _ in results]
    assert not any(line for rank in printed[:-1] for line in rank)
    first, second = counted(conversations(0)), counted(conversations(1))
    rows = read_rows(file)
    assert [row["iteration"] for row in rows] == [1, 2]
    config = read_config(checkpoint)
    # As the losses of Megatron's log, the second line of a process is about both iterations.
    for row, line, total, iterations in zip(rows, printed[-1], (first, first + second), (1, 2), strict=True):
        assert row["packs"] * iterations == total.packs
        assert row["tokens"] * iterations == total.tokens
        assert row["supervised_tokens"] * iterations == total.supervised_tokens
        assert row["images"] * iterations == total.images
        assert row["videos"] * iterations == total.videos
        assert row["patches"] * iterations == total.patches
        assert row["padding_share"] == 1 - total.tokens / total.length
        assert row["tokens_per_second"] == pytest.approx(total.tokens / iterations / 0.25, rel=1e-12)
        flops = total.training_flops(config)
        assert row["model_flops"] * iterations == flops
        assert row["model_tflops_per_rank"] == pytest.approx(flops / iterations / 0.25 / layout.world / 1e12, rel=1e-12)
        assert (row["lm_loss"], row["mtp_loss"], row["grad_norm"], row["learning_rate"]) == (5, 6, 6.024, 1e-3)
        iteration = read_iteration(line)
        assert iteration is not None
        assert iteration.measured == {column: row[column] for column in iteration.measured}
        assert len(iteration.measured) == 10


# A loss that is not finite


def spoiled(group: Sequence[reference.Conversation]) -> dict[str, torch.Tensor]:
    """A pack whose last image has a pixel that is not a number."""
    pack = reference.pack(group, PACK_LENGTH)
    pack["pixel_values"][-1, 0] = float("nan")
    return pack


@pytest.mark.parametrize(
    "layout",
    [DP2, PP2, pytest.param(Layout(tp=2, sp=True, cp=2, world=4), marks=pytest.mark.layouts)],
    ids=str,
)
def test_a_loss_that_is_not_finite_is_the_same_error_on_all_ranks(pool: Pool, folder: Path, layout: Layout) -> None:
    groups = conversations(0)
    group = [reference.conversation(kind, 40 + n) for n, kind in enumerate(("text", "image", "text"))]
    sound = [reference.pack(one, PACK_LENGTH) for one in groups]
    results = pool.run(metrics_ranks.errors, layout, folder=folder, steps=[sound, [*sound[:3], spoiled(group)], sound])
    assert all(result == results[0] for result in results)
    before, error, after = results[0]
    assert (before, after) == ("", "")
    rank, micro_batch = (1, 1) if layout.dp == 2 else (0, 3)
    # The reference attention multiplies the image's values by zero for earlier tokens, so that these are lost too.
    c = group[1]
    label = int(c.labels[0])
    what = "not supervised" if label == -100 else f"label {label}"
    for stated in (
        f"iteration 2: micro-batch {micro_batch} of data-parallel rank {rank}, item 103 of the training dataset: ",
        f"found {len(c.tokens)} that are not, the first at token 0 of segment 1 ({what}): nan. ",
        "nan. All weights are finite, and nothing was updated",
    ):
        assert stated in error


@pytest.mark.parametrize("layout", [Layout()], ids=str)
def test_weights_that_are_not_finite_are_named(pool: Pool, folder: Path, layout: Layout) -> None:
    weight = "language_model.decoder.final_layernorm.weight"
    (found,) = pool.run(metrics_ranks.errors, layout, folder=folder, steps=[packs(0)], weight=weight)
    assert f"({weight}): an earlier update broke them" in found[0]
    assert "; 3 other packs have such losses too" in found[0]
    assert "label" in found[0]


# No supervised token


def without_labels(pack: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return pack | {"labels": torch.full_like(pack["labels"], -100)}


def test_router_losses_without_a_supervised_token_give_no_gradient(pool: Pool, experts: Path) -> None:
    """Their sum would be divided by 1 in place of thousands of tokens."""
    coefficients = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.05, "moe_router_load_balancing_type": "aux_loss"}
    step = packs(0)
    for supervised in (True, False):
        given = step if supervised else [without_labels(pack) for pack in step]
        results = pool.run(metrics_ranks.unsupervised, DP2, folder=experts, packs=given, **coefficients)
        for result in results:
            assert (result["gradient"] > 0) == supervised
            assert all((report[0] > 0) == supervised for report in result["reports"])


def test_one_pack_with_supervised_tokens_suffices(pool: Pool, experts: Path) -> None:
    step = [without_labels(packs(0)[0]), packs(0)[1]]
    results = pool.run(metrics_ranks.unsupervised, DP2, folder=experts, packs=step, moe_z_loss_coeff=0.05)
    assert all(result["gradient"] > 0 for result in results)
