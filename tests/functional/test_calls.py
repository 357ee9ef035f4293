"""The calls of other frameworks give transformers' token losses and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_vlbridge import read_config
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertForm
from tests import mtp_reference, reference
from tests.cases import later
from tests.closeness import FP32, relative_error
from tests.functional import call_ranks, ranks
from tests.functional.parity import run_reference, tolerance
from tests.functional.pool import Layout, Pool

ONE, TP2, TP2_SP = Layout(), Layout(tp=2, world=2), Layout(tp=2, sp=True, world=2)
CP2, PP2 = Layout(cp=2, world=2), Layout(pp=2, world=2)
TP2_SP_CP2 = Layout(tp=2, sp=True, cp=2, world=4)
TP2_SP_PP2 = Layout(tp=2, sp=True, pp=2, world=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("moe"), experts={})


def conversations(name: str = "") -> list[reference.Conversation]:
    """Those of the call of this name: AReaL has no videos."""
    kinds = ("text", "image", "images") if name == "areal" else ("text", "image", "video", "mixed")
    return [reference.conversation(kind, seed) for seed, kind in enumerate(kinds, 1)]


def errors(found: list[dict[str, Any]], folder: Path, copies: int = 1, name: str = "") -> dict[str, float]:
    """Of the token losses and of every gradient; `copies`: how many data-parallel ranks made the call."""
    expected, config = run_reference(folder, [conversations(name)]), read_config(folder)
    wanted = torch.cat([x * (c.labels != -100) for x, c in zip(expected.losses, conversations(name), strict=True)])
    losses, counts = torch.zeros_like(wanted), torch.zeros(len(wanted), dtype=torch.int64)
    for rank in found:
        for mine, owner in rank["found"] if rank["tp_rank"] == 0 else ():
            assert len(mine) == len(owner)
            kept = owner >= 0
            losses[owner[kept]] = mine[kept]
            counts[owner[kept]] += 1
    assert bool((counts == copies).all())
    table = find(config).table(config, ExpertForm.FUSED_OUT_IN)
    gradients = table.to_hf(ranks.assemble([rank["gradients"] for rank in found]))
    result = {name: relative_error(gradients[name], x) for name, x in expected.gradients.items()}
    return result | {"token losses": relative_error(losses, wanted)}


CASES = [
    (ONE, "verl_thd"),
    (ONE, "nemo_rl"),
    (ONE, "roll"),
    (ONE, "slime"),
    (ONE, "verl_bshd"),
    (ONE, "sky_rl"),
    (TP2_SP, "areal"),
    (ONE, "megatron_bridge"),
    (TP2_SP, "verl_thd"),
    (PP2, "sky_rl"),
    (CP2, "slime"),
    (TP2_SP_CP2, "verl_thd"),
    (TP2_SP_CP2, "megatron_bridge"),
]
LATER = [
    (layout, name)
    for layout in (TP2, TP2_SP, CP2, PP2, TP2_SP_CP2, TP2_SP_PP2, Layout(pp=2, cp=2, world=4))
    for name in call_ranks.CALLS
    if (layout, name) not in CASES
]
LATER += [(layout, "miles") for layout in (ONE, TP2_SP, CP2, PP2, TP2_SP_CP2)]
LATER += [(layout, "areal") for layout in (ONE, PP2, TP2_SP_PP2)]


def parameters(cases: list[tuple[Layout, str]], **options: Any) -> list[Any]:
    """With the layout and the framework as the test's name."""
    return [pytest.param(layout, name, id=f"{layout}-{name}", **options) for layout, name in cases]


@pytest.mark.parametrize(("layout", "name"), [*parameters(CASES), *parameters(LATER, marks=pytest.mark.layouts)])
def test_a_call_equals_separate_conversations(pool: Pool, folder: Path, layout: Layout, name: str) -> None:
    found = pool.run(call_ranks.run, layout, folder=folder, name=name, conversations=conversations(name))
    assert_small(errors(found, folder, name=name), folder)


def assert_small(found: dict[str, float], folder: Path) -> None:
    """Every error within the tolerance of the suite."""
    assert not {what: error for what, error in found.items() if not error < tolerance(read_config(folder))}


@pytest.mark.parametrize("name", ["verl_thd", *map(later, ("slime", "verl_bshd", "megatron_bridge"))])
def test_a_call_with_experts(pool: Pool, moe_folder: Path, name: str) -> None:
    layout = Layout(ep=2, world=2)
    found = pool.run(call_ranks.run, layout, folder=moe_folder, name=name, conversations=conversations())
    assert_small(errors(found, moe_folder, copies=2), moe_folder)


@pytest.mark.parametrize("layout", [CP2, *map(later, (ONE, TP2_SP, PP2, TP2_SP_CP2, TP2_SP_PP2))], ids=str)
def test_a_loss_that_the_framework_averages(pool: Pool, folder: Path, layout: Layout) -> None:
    """Which `check_layout` accepts with `own_loss`."""
    options = {"folder": folder, "name": "verl_thd", "conversations": conversations(), "mean": True}
    assert_small(errors(pool.run(call_ranks.run, layout, **options), folder), folder)


@pytest.mark.parametrize("name", ["nemo_rl", later("verl_thd")])
def test_router_losses_do_not_count_the_padding_of_rows(pool: Pool, moe_folder: Path, name: str) -> None:
    """The same gradients as from a padded batch, of which no padding gets to the router."""
    options = {"folder": moe_folder, "conversations": conversations(), "moe_aux_loss_coeff": 0.5}
    one, other = (
        ranks.assemble([rank["gradients"] for rank in pool.run(call_ranks.run, TP2_SP, name=x, **options)])
        for x in ("verl_bshd", name)
    )
    assert not {key: error for key, x in one.items() if not (error := relative_error(other[key], x)) < FP32}


@pytest.mark.parametrize(("layout", "tied"), [(ONE, False), later(TP2_SP, True), later(PP2, False)])
def test_mtp_labels_beside_logits(pool: Pool, tmp_path: Path, layout: Layout, tied: bool) -> None:
    """verl: labels and a loss mask are for the loss of the MTP layer, the main loss is made from the logits."""
    folder = mtp_reference.write_mtp_checkpoint(tmp_path, tied=tied)
    options = {"folder": folder, "name": "verl_mtp", "conversations": conversations(), "logits_with_labels": True}
    assert_small(errors(pool.run(call_ranks.run, layout, **options), folder), folder)


def test_mtp_labels_matter(pool: Pool, tmp_path: Path) -> None:
    """Without them the layer learns nothing."""
    folder = mtp_reference.write_mtp_checkpoint(tmp_path)
    (found,) = pool.run(call_ranks.run, ONE, folder=folder, name="verl_thd", conversations=conversations())
    worst = errors([found], folder)
    assert worst.pop("token losses") < tolerance(read_config(folder))
    assert {name for name, error in worst.items() if error > 0.9} >= {name for name in worst if "mtp" in name}


@pytest.mark.parametrize(("layout", "tied"), [(ONE, True), (TP2_SP_CP2, False), later(TP2_SP, False)])
def test_an_output_processor_makes_the_log_probs(pool: Pool, tmp_path: Path, layout: Layout, tied: bool) -> None:
    """verl's fused kernel in words of torch: from the hidden states, the head's weight and the labels as given."""
    folder = reference.write_checkpoint(tmp_path, tied=tied)
    found = pool.run(call_ranks.run, layout, folder=folder, name="verl_fused", conversations=conversations())
    assert_small(errors(found, folder), folder)


@pytest.mark.parametrize("layout", [ONE, later(TP2_SP), later(PP2)], ids=str)
def test_the_head_of_a_critic_takes_effect(pool: Pool, folder: Path, layout: Layout) -> None:
    """Set on the outer model, it gives the values of transformers' last hidden states; one set of parameters.

    It keeps its weight when those of the folder are loaded, which `value_head` has to say, and only then.
    """
    found = pool.run(call_ranks.critic, layout, folder=folder, conversations=conversations())
    expected = hidden_states(folder) @ call_ranks.value_weight(read_config(folder).text.hidden_size).T
    values = [x for rank in found for x in rank["values"]]
    assert values
    for value in values:
        assert relative_error(value, expected) < tolerance(read_config(folder))
    wanted = ("value_head: expected the head of a critic", "output_layer.weight: expected [128, 64] in the model")
    for rank in found:
        assert [words in error for words, error in zip(wanted, rank["errors"], strict=True)] == [True, True]
    assert all(rank["heads"] == ["language_model.output_layer.weight"] for rank in found if rank["values"])
    assert all(rank["same_decoder"] for rank in found)


def hidden_states(folder: Path) -> torch.Tensor:
    """The last of transformers, of all conversations joined."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        rows = [model.model(**reference.model_inputs(c)).last_hidden_state[0] for c in conversations()]
    return torch.cat(rows)


def test_a_call_that_is_wrong_on_one_rank_is_refused_on_all(pool: Pool, folder: Path) -> None:
    """And the next call is taken."""
    found = pool.run(call_ranks.refusals, CP2, folder=folder, conversations=conversations())
    assert found[0] == found[1]
    for words, message in zip(call_ranks.REFUSED, found[0], strict=True):
        assert words in message
