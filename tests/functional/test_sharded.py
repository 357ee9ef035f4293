"""Ranks that are given only their own part of a pack give transformers' logits, loss and gradients."""

from pathlib import Path

import pytest
import torch

from tests import reference
from tests.functional import ranks, sharded_ranks
from tests.functional.parity import PACK_LENGTH, compare
from tests.functional.pool import Layout, Pool

MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
CP2, CP2_TP2 = Layout(cp=2, world=2), Layout(cp=2, tp=2, sp=True, world=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("untied"))


def picture_in_the_middle() -> reference.Conversation:
    """Under context parallelism of size 2 the first rank holds no token of its picture."""
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
        [picture_in_the_middle()],
        [reference.conversation(kind, seed) for kind, seed in (("images", 6), ("video", 7))],
    ]


def row(group: list[reference.Conversation], cp: int, known: bool) -> dict[str, torch.Tensor]:
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
    spare = PACK_LENGTH - bounds[-1]
    deal([0] * spare, tokens)
    deal([-100] * spare, labels)
    pack = reference.pack(group, PACK_LENGTH)
    media = {key: pack[key] for key in MEDIA}
    lengths = {"lengths": torch.tensor([*[len(c.tokens) for c in group], spare])} if known else {}
    cut = {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)}
    return cut | {"cu_seqlens": torch.tensor([*bounds, PACK_LENGTH])} | lengths | media


def deal(values: list[int], hands: list[list[int]]) -> None:
    """To each hand its two of the equal chunks."""
    size = len(values) // (2 * len(hands))
    for chunk in range(2 * len(hands)):
        hands[min(chunk, 2 * len(hands) - 1 - chunk)] += values[chunk * size : (chunk + 1) * size]


@pytest.mark.parametrize("known", [True, False], ids=["lengths known", "padded lengths alone"])
@pytest.mark.parametrize("layout", [CP2, CP2_TP2, Layout(cp=2, pp=4, world=8)], ids=str)
def test_parts_equal_separate_conversations(pool: Pool, folder: Path, layout: Layout, known: bool) -> None:
    rows = [row(group, layout.cp, known) for group in groups()]
    assert not (rows[2]["input_ids"][0] == reference.IMAGE).any()
    found = pool.run(ranks.forward_backward, layout, folder=folder, packs=rows, step=sharded_ranks.row_step)
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
        "the row has 10 tokens": {"input_ids": good["input_ids"][1:, :10]},
        "int64 \\[1, T\\]": {"input_ids": good["input_ids"]},
        "placeholder tokens": {"input_ids": broken},
        "image patches": {"pixel_values": good["pixel_values"][1:]},
        "has no placeholders": {"input_ids": torch.full_like(broken, 50)},
        "differ in image grids": {"pixel_values": None, "image_grid_thw": None},
        "differ in cu_seqlens": {"cu_seqlens": torch.tensor([0, PACK_LENGTH])},
        "cu_seqlens holds 0": {"cu_seqlens": torch.tensor([4, PACK_LENGTH])},
        "differ in a whole row": {"input_ids": torch.full((1, PACK_LENGTH), 50)} | dict.fromkeys(MEDIA),
    }
    rows = [good] * (len(faults) + 1)
    found = pool.run(sharded_ranks.answers, layout, folder=folder, rows=rows, faults=[*faults.values(), {}])
    for message, *refusals in zip(faults, *found, strict=False):
        assert all(refusal == refusals[0] for refusal in refusals)
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(refusals[0])
    assert [answer[-1] for answer in found] == [PACK_LENGTH // layout.cp] * layout.world
