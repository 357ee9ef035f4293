"""Frozen parts do not change, the others get the gradients of transformers, and learning rates are multiplied."""

import math
from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlbridge import read_config
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertForm
from tests import mtp_reference, reference
from tests.closeness import relative_error
from tests.functional import freeze_ranks, ranks
from tests.functional.parity import PACK_LENGTH, run_reference, tolerance
from tests.functional.pool import Layout, Pool

DENSE = ("vision", "merger", "language", "embedding")
EXPERTS = (*DENSE, "router")
LAYOUTS = (
    Layout(),
    Layout(pp=2, world=2),
    Layout(pp=2, vpp=2, world=2),
    Layout(world=2),
    Layout(cp=2, world=2),
)
PLAIN, PP2, VPP2, DP2, CP2 = LAYOUTS
TP2_SP, EP2 = Layout(tp=2, sp=True, world=2), Layout(ep=2, world=2)
# The MTP layer, with its copy of the embedding, on a stage between the others.
OWN_STAGE = Layout(pp=3, world=3, stages="Etttt|m|L")
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def part(name: str) -> str:
    """The part of a tensor of transformers."""
    if ".visual." in name:
        return "merger" if ".visual.merger." in name or ".visual.deepstack_merger_list." in name else "vision"
    if name.endswith("embed_tokens.weight"):
        return "embedding"
    return "router" if name.endswith(".mlp.gate.weight") else "language"


def subsets(parts: Sequence[str]) -> list[tuple[str, ...]]:
    """Every choice of parts, but for all."""
    return [chosen for size in range(len(parts)) for chosen in combinations(parts, size)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds: dict[str, dict[str, Any]] = {
        "untied": {},
        "tied": {"tied": True},
        "experts": {"experts": {}},
        "linear-experts": {"linear": {}, "experts": {}},
        "mtp-tied": {"tied": True},
        "mtp-experts": {"experts": {}},
    }
    made, folders = tmp_path_factory.mktemp("freeze"), {}
    for kind, options in kinds.items():
        write = mtp_reference.write_mtp_checkpoint if kind.startswith("mtp") else reference.write_checkpoint
        folders[kind] = write(made / kind, **options)
    return folders


# Four micro-batches, the first one text alone.
GROUPS = [
    [reference.conversation(kind, 70 + 10 * i + j) for j, kind in enumerate(kinds)]
    for i, kinds in enumerate((("text", "text"), ("image", "text"), ("mixed",), ("video", "text")))
]
# At the first, a middle and the last place.
ORDERS = ((0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 3, 0))
# With two data-parallel ranks, which take every other pack: each of them has all four.
PAIRED = ((0, 1, 1, 2, 2, 3, 3, 0), (1, 1, 0, 2, 2, 0, 3, 3), (1, 2, 2, 0, 3, 1, 0, 3))


def check(
    pool: Pool, folder: Path, layout: Layout, sets: Sequence[Collection[str]], first: int = 0, **options: object
) -> None:
    """Freeze each of the sets, with the pack of text at each place in turn, from the place `first`."""
    packs = [reference.pack(group, PACK_LENGTH) for group in GROUPS]
    orders = [(PAIRED if layout.dp == 2 else ORDERS)[(first + i) % 3] for i in range(len(sets))]
    by_rank = pool.run(
        freeze_ranks.freeze_each, layout, folder=folder, packs=packs, sets=sets, orders=orders, **options
    )
    expected = run_reference(folder, GROUPS)
    config, before = read_config(folder), weights_of(folder)
    table = find(config).table(config, ExpertForm.FUSED_OUT_IN)
    for number, frozen in enumerate(sets):
        results = [rank[number] for rank in by_rank]
        gradients = table.to_hf(ranks.assemble([r["gradients"] for r in results]))
        after = table.to_hf(ranks.assemble([r["weights"] for r in results]))
        assert gradients.keys() == expected.gradients.keys()
        for name, x in expected.gradients.items():
            if part(name) in frozen:
                assert (gradients[name] == freeze_ranks.NO_GRADIENT).all(), name
            else:
                assert relative_error(gradients[name], x) < tolerance(config), f"{name}, frozen: {frozen}"
        assert after.keys() == before.keys()
        for name, x in before.items():
            if after[name].shape != x.shape:  # experts that the file has the other way around
                x = x.transpose(1, 2)
            assert torch.equal(after[name], x) == (part(name) in frozen), f"{name}, frozen: {frozen}"
        reports = [report for r in results for report in r["reports"]]
        total, count = torch.stack(reports).sum(0).tolist()
        assert relative_error(total / count, expected.loss) < tolerance(config)
        for r in results:
            assert r["gradient elements"] == r["trainable"]
            assert r["state elements"] == 2 * r["trainable"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


# In each layout three sets, one for each place of the pack of text. All sets: below.
CHOSEN = (
    ("untied", VPP2, (("merger",), ("vision", "language", "embedding"), ("vision", "merger"))),
    ("experts", EP2, (("router",), ("language", "vision"), ("vision", "merger", "language", "embedding"))),
    ("mtp-tied", OWN_STAGE, (("embedding",), ("vision", "merger", "language"), ("vision", "embedding"))),
)


@pytest.mark.parametrize(("kind", "layout", "sets"), CHOSEN, ids=str)
def test_frozen_parts_do_not_change_and_the_others_get_the_gradients_of_transformers(
    pool: Pool, folders: dict[str, Path], kind: str, layout: Layout, sets: Sequence[Collection[str]]
) -> None:
    check(pool, folders[kind], layout, sets)


# Every choice of parts in each layout, each choice with the pack of text at each of the three places in one of them.
EVERY_CHOICE = [*(("tied", layout) for layout in LAYOUTS), ("experts", EP2)]
# Every third one.
SOME = [("tied", TP2_SP), ("experts", PP2), ("linear-experts", PLAIN), ("mtp-tied", OWN_STAGE)]


@pytest.mark.layouts
@pytest.mark.parametrize(("kind", "layout"), [*EVERY_CHOICE, *SOME], ids=str)
def test_every_choice_of_frozen_parts(pool: Pool, folders: dict[str, Path], kind: str, layout: Layout) -> None:
    sets = subsets(EXPERTS if "experts" in kind else DENSE)
    first = [*EVERY_CHOICE, *SOME].index((kind, layout))
    check(pool, folders[kind], layout, sets[first % 3 :: 3] if (kind, layout) in SOME else sets, first=first)


@pytest.mark.layouts
@pytest.mark.parametrize("layout", [PP2, CP2], ids=str)
def test_recomputed_layers(pool: Pool, folders: dict[str, Path], layout: Layout) -> None:
    check(pool, folders["tied"], layout, subsets(DENSE)[::3], **FULL)


def test_freezing_changes_no_other_gradient_of_transformers(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForImageTextToText

    conversations = [c for group in GROUPS for c in group]
    model = AutoModelForImageTextToText.from_pretrained(folders["untied"], dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = part(name) not in ("vision", "language")
    losses = [reference.token_losses(model(**reference.model_inputs(c)).logits[0], c.labels) for c in conversations]
    (torch.cat(losses).sum() / sum(int((c.labels != -100).sum()) for c in conversations)).backward()
    expected = reference.run_transformers(folders["untied"], conversations).gradients
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative_error(parameter.grad, expected[name]) < 1e-6, name


MULTIPLIERS = ({"vision": 0.1, "merger": 3.0}, {"language": 0.5, "embedding": 0.25})


# SGD at a rate with which the changes of the weights are far above their rounding.
@pytest.mark.parametrize(("optimizer", "scale"), [("adam", 1.0), ("sgd", 1000.0)])
@pytest.mark.parametrize("layout", [PLAIN, pytest.param(PP2, marks=pytest.mark.layouts)], ids=str)
def test_a_step_moves_each_part_by_its_multiple(
    pool: Pool, folders: dict[str, Path], layout: Layout, optimizer: str, scale: float
) -> None:
    """Against the first step of the optimizer, parameter by parameter; Megatron decays no parameter of one dim."""
    folder, packs = folders["tied"], [reference.pack(group, PACK_LENGTH) for group in GROUPS]
    arguments = {"packs": packs, "optimizer": optimizer, "scale": scale, "runs": MULTIPLIERS}
    by_rank = pool.run(freeze_ranks.step_each, layout, folder=folder, **arguments)
    table, before = find(read_config(folder)).table(read_config(folder)), weights_of(folder)
    schedule = freeze_ranks.MIN_LR + (1 + math.cos(math.pi / 8)) / 2 * (freeze_ranks.LR - freeze_ranks.MIN_LR)
    for number, multipliers in enumerate(MULTIPLIERS):
        gradients = table.to_hf(ranks.assemble([rank[number]["gradients"] for rank in by_rank]))
        after = table.to_hf(ranks.assemble([rank[number]["weights"] for rank in by_rank]))
        assert after.keys() == before.keys()
        for name, x in before.items():
            lr = scale * schedule * multipliers.get(part(name), 1.0)
            gradient = gradients[name].double()
            step = gradient / (gradient.abs() + 1e-8) if optimizer == "adam" else gradient
            decay = freeze_ranks.WEIGHT_DECAY if x.dim() > 1 else 0.0
            expected = x.double() - lr * (step + decay * x.double())
            torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
            assert relative_error(after[name] - x, expected - x) < 0.01, name
