"""Ranks that are given only their own part of a pack give transformers' logits, loss and gradients."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from tests import reference
from tests.cases import later
from tests.functional import ranks, sharded_ranks
from tests.functional.parity import PACK_LENGTH, compare
from tests.functional.pool import Layout, Pool

MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
CP2, CP2_TP2 = Layout(cp=2, world=2), Layout(cp=2, tp=2, sp=True, world=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("moe"), experts={})


def image_in_the_middle() -> reference.Conversation:
    """Under context parallelism of size 2 the first rank holds no token of its image."""
    random = torch.Generator().manual_seed(77)
    words = torch.randint(reference.TEXT_IDS.start, reference.TEXT_IDS.stop, (24,), generator=random).tolist()
    tokens = [*words[:12], reference.START, *[reference.IMAGE] * 6, reference.END, *words[12:]]
    labels = [*words[1:12], *[-100] * 8, *words[12:], -100]
    patches = torch.randn(24, reference.PATCH_DIM, generator=random)
    grids = torch.tensor([[1, 4, 6]])
    return reference.Conversation(
        torch.tensor(tokens), torch.tensor(labels), patches, grids, patches[:0], torch.zeros(0, 3, dtype=torch.int64)
    )


def groups() -> list[list[reference.Conversation]]:
    return [
        [reference.conversation(kind, seed) for kind, seed in (("mixed", 2), ("text", 3), ("image", 4))],
        [reference.conversation("text", 5)],
        [image_in_the_middle()],
        [reference.conversation(kind, seed) for kind, seed in (("images", 6), ("video", 7))],
    ]


def row(
    group: list[reference.Conversation], cp: int, known: bool, length: int = PACK_LENGTH
) -> dict[str, torch.Tensor]:
    """A packed row cut over `cp` ranks, segment by segment and chunk by chunk; `known`: it says what is padding."""
    tokens: list[list[int]] = [[] for _ in range(cp)]
    labels: list[list[int]] = [[] for _ in range(cp)]
    filling = 0 if not known else reference.IMAGE
    segments = [(c.tokens.tolist(), c.labels.tolist()) for c in group]
    bounds = [0]
    for ids, targets in segments:
        padding = -len(ids) % (2 * cp)
        ids, targets = ids + [filling] * padding, targets + [-100] * padding
        bounds.append(bounds[-1] + len(ids))
        deal(ids, tokens)
        deal(targets, labels)
    spare = length - bounds[-1]
    deal([0] * spare, tokens)
    deal([-100] * spare, labels)
    pack = reference.pack(group, length)
    media = {key: pack[key] for key in MEDIA}
    lengths = {"lengths": torch.tensor([*[len(c.tokens) for c in group], spare])} if known else {}
    cut = {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)}
    return cut | {"cu_seqlens": torch.tensor([*bounds, length])} | lengths | media


def deal(values: list[int], hands: list[list[int]]) -> None:
    """To each hand its two of the equal chunks."""
    size = len(values) // (2 * len(hands))
    for chunk in range(2 * len(hands)):
        hands[min(chunk, 2 * len(hands) - 1 - chunk)] += values[chunk * size : (chunk + 1) * size]


@pytest.mark.parametrize("known", [True, False], ids=["lengths known", "padded lengths alone"])
@pytest.mark.parametrize("layout", [CP2, *map(later, (CP2_TP2, Layout(cp=2, pp=4, world=8)))], ids=str)
def test_parts_equal_separate_conversations(pool: Pool, folder: Path, layout: Layout, known: bool) -> None:
    rows = [row(group, layout.cp, known) for group in groups()]
    assert not (rows[2]["input_ids"][0] == reference.IMAGE).any()
    found = pool.run(ranks.forward_backward, layout, folder=folder, packs=rows, step=sharded_ranks.row_step)
    compare(found, layout, folder, groups()).check()


@pytest.mark.parametrize("others", ["none", later("meta")])
@pytest.mark.parametrize("layout", [later(Layout(cp=2, pp=2, world=4)), Layout(cp=2, pp=2, vpp=2, world=4)], ids=str)
def test_rows_need_pixels_only_where_the_tower_is(pool: Pool, folder: Path, layout: Layout, others: str) -> None:
    rows = [row(group, layout.cp, known=True) for group in groups()]
    step = partial(sharded_ranks.pixels_for_the_tower, step=sharded_ranks.row_step, others=others)
    found = pool.run(ranks.forward_backward, layout, folder=folder, packs=rows, step=step)
    compare(found, layout, folder, groups()).check()


@pytest.mark.parametrize("others", [later("none"), "meta"])
def test_padded_batches_need_pixels_only_where_the_tower_is(pool: Pool, folder: Path, others: str) -> None:
    layout, batches = Layout(pp=2, world=2), [reference.padded_batch(group) for group in groups()]
    step = partial(sharded_ranks.pixels_for_the_tower, step=ranks.padded_step, others=others)
    options = {"step": step, "variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    found = pool.run(ranks.forward_backward, layout, folder=folder, packs=batches, **options)
    compare(found, layout, folder, groups()).check()


def test_parts_with_experts_and_recomputed_layers(pool: Pool, moe_folder: Path) -> None:
    folder = moe_folder
    layout = Layout(cp=2, ep=2, pp=2, world=4)
    rows = [row(group, layout.cp, known=True) for group in groups()]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    found = pool.run(ranks.forward_backward, layout, folder=folder, packs=rows, step=sharded_ranks.row_step, **full)
    compare(found, layout, folder, groups()).check()


@pytest.mark.parametrize("layout", [CP2, CP2_TP2], ids=str)
def test_the_whole_row_gives_the_same_as_this_ranks_part(pool: Pool, folder: Path, layout: Layout) -> None:
    """Also where Megatron's own parameters say where the segments end."""
    group = groups()[0]
    parts = row(group, layout.cp, known=True)
    whole = []
    for c, end in zip(group, parts["cu_seqlens"][1:], strict=False):
        whole += c.tokens.tolist()
        whole += [0] * (int(end) - len(whole))
    whole += [0] * (PACK_LENGTH - len(whole))
    run = sharded_ranks.logits_of_each_form
    for found in pool.run(run, layout, folder=folder, parts=parts, whole=torch.tensor([whole])):
        assert found[0].shape[1] == PACK_LENGTH // layout.cp
        assert all(torch.equal(logits, found[0]) for logits in found)


@pytest.mark.parametrize("layout", [CP2, CP2_TP2], ids=str)
def test_a_rank_with_a_bad_row_stops_every_rank_and_the_next_row_is_taken(
    pool: Pool, folder: Path, layout: Layout
) -> None:
    good = row(groups()[0], layout.cp, known=False)
    broken = good["input_ids"][1:].clone()
    broken[0, int((broken[0] == reference.IMAGE).nonzero()[0])] = 50
    faults = {
        "the packed batch has 10 tokens": {"input_ids": good["input_ids"][1:, :10]},
        "int64 \\[1, T\\]": {"input_ids": good["input_ids"]},
        "placeholder tokens": {"input_ids": broken},
        "image patches": {"pixel_values": good["pixel_values"][1:]},
        "has no placeholders": {"input_ids": torch.full_like(broken, 50)},
        "differ in image grids": {"pixel_values": None, "image_grid_thw": None},
        "differ in cu_seqlens": {"cu_seqlens": torch.tensor([0, PACK_LENGTH])},
        "cu_seqlens holds 0": {"cu_seqlens": torch.tensor([4, PACK_LENGTH])},
        "differ in a whole pack": {"input_ids": torch.full((1, PACK_LENGTH), 50)} | dict.fromkeys(MEDIA),
        "attention_mask has 1 rows, but cu_seqlens has 4 segments": {"attention_mask": torch.ones_like(broken)},
        "attention_mask: expected": {"attention_mask": torch.ones_like(broken)[:, 1:]},
        "expected those of 3 images, found those of 2": {"cu_seqlens": None},
        "S a multiple of 4": {"cu_seqlens": None, "input_ids": broken[:, :-1]},
        "lengths are those of a packed batch": {"cu_seqlens": None, "lengths": torch.tensor([PACK_LENGTH])},
        "packed_seq_params says where": {"packed_seq_params": PackedSeqParams()},
        "packed_seq_params has no cu_seqlens_q": {"cu_seqlens": None, "packed_seq_params": PackedSeqParams()},
        "takes input_ids": {"input_ids": None},
        "has no attribute 'cpu'": {"input_ids": broken.tolist()},
    }
    rejected_on_every_rank(pool, layout, folder, good, faults)


def rejected_on_every_rank(
    pool: Pool, layout: Layout, folder: Path, good: dict[str, Any], faults: dict[str, Any], **options: Any
) -> None:
    """With each fault of the last rank all ranks tell its message, and then take the good row."""
    rows = [good] * (len(faults) + 1)
    found = pool.run(sharded_ranks.answers, layout, folder=folder, rows=rows, faults=[*faults.values(), {}], **options)
    for message, *errors in zip(faults, *found, strict=False):
        assert all(error == errors[0] for error in errors)
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(errors[0])
    assert [answer[-1] for answer in found] == [PACK_LENGTH // layout.cp] * layout.world


@pytest.mark.parametrize("layout", [Layout(), CP2], ids=str)
def test_router_losses_reject_rows_that_do_not_say_what_is_padding(
    pool: Pool, moe_folder: Path, layout: Layout
) -> None:
    good = row(groups()[0], layout.cp, known=True)
    bounds = good.pop("cu_seqlens").int()
    true = torch.cat((bounds[:1], good.pop("lengths").cumsum(0))).int()
    bounds_of_both = {"packed_seq_params": PackedSeqParams(cu_seqlens_q=true, cu_seqlens_q_padded=bounds)}
    faults = {
        "must not count padding": {"packed_seq_params": PackedSeqParams(cu_seqlens_q=bounds)},
        "the same as cu_seqlens_q.*give `cu_seqlens` and `lengths`": {
            "packed_seq_params": PackedSeqParams(cu_seqlens_q=bounds, cu_seqlens_q_padded=bounds.long())
        },
        "true `lengths`": {"packed_seq_params": None, "cu_seqlens": bounds},
    }
    for loss in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        rejected_on_every_rank(pool, layout, moe_folder, good | bounds_of_both, faults, **{loss: 0.1})


@pytest.mark.parametrize("layout", [Layout(), CP2], ids=str)
def test_equal_bounds_of_megatrons_parameters_are_taken_without_router_losses(
    pool: Pool, moe_folder: Path, layout: Layout
) -> None:
    good = row(groups()[0], layout.cp, known=False)
    bounds = good.pop("cu_seqlens").int()
    good |= {"packed_seq_params": PackedSeqParams(cu_seqlens_q=bounds, cu_seqlens_q_padded=bounds)}
    rejected_on_every_rank(pool, layout, moe_folder, good, {})


ALL_GATHER = {"moe_token_dispatcher_type": "allgather"}


@pytest.mark.parametrize("layout", [Layout(ep=2, world=2), later(Layout(cp=2, ep=2, world=4))], ids=str)
def test_the_all_gather_dispatcher_takes_rows_of_one_length_alone(pool: Pool, moe_folder: Path, layout: Layout) -> None:
    """Which is the model's `seq_length`."""
    rows = [row(groups()[0], layout.cp, known=False, length=length) for length in (PACK_LENGTH, 2 * PACK_LENGTH)]
    run: dict[str, Any] = {"folder": moe_folder, "rows": rows, "faults": [{}, {}]}
    for taken, refused in pool.run(sharded_ranks.answers, layout, **run, **ALL_GATHER, seq_length=PACK_LENGTH):
        assert taken == PACK_LENGTH // layout.cp
        assert all(words in refused for words in (f"{2 * PACK_LENGTH} tokens", f"{PACK_LENGTH} (--seq-length)"))
        assert "--moe-token-dispatcher-type alltoall" in refused
    for answers in pool.run(sharded_ranks.answers, layout, **run, **ALL_GATHER):
        for refused, length in zip(answers, (PACK_LENGTH, 2 * PACK_LENGTH), strict=True):
            assert f"{length} tokens" in refused
            assert "give the model `seq_length`" in refused
    for taken in pool.run(sharded_ranks.answers, layout, **run):
        assert taken == [PACK_LENGTH // layout.cp, 2 * PACK_LENGTH // layout.cp]
