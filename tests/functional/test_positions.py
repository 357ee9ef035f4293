"""Positions that come with a batch are used by every rank: transformers with the same positions gives the same."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import mtp_reference, reference
from tests.functional import position_ranks, ranks
from tests.functional.parity import PACK_LENGTH, compare
from tests.functional.pool import Layout, Pool
from tests.functional.test_sharded import deal
from tests.functional.test_sharded import row as row_without_positions
from tests.reference import Conversation

# Where padding is known to be padding, any position will do.
ANY = 7777
CP2 = Layout(cp=2, world=2)
VARIABLE = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hf")
    write: dict[str, Callable[..., Path]] = {"": reference.write_checkpoint, "-mtp": mtp_reference.write_mtp_checkpoint}
    return {
        kind + mtp: make(folder / (kind + mtp), **reference.KINDS[kind])
        for mtp, make in write.items()
        for kind in ("dense", "linear", "experts")
    }


def with_positions(c: Conversation, seed: int) -> Conversation:
    """With random positions, other ones for time, row and column."""
    random = torch.Generator().manual_seed(seed)
    return replace(c, position_ids=torch.randint(-40, 400, (3, len(c.tokens)), generator=random))


def groups() -> list[list[Conversation]]:
    """The first and the last have positions of their own, the second is given plain counts, the third nothing."""
    kinds = (("mixed", "text", "image"), ("video", "image"), ("images", "text"), ("image", "video", "text"))
    found = [[reference.conversation(k, 10 * i + j) for j, k in enumerate(group)] for i, group in enumerate(kinds)]
    return [[with_positions(c, j) for j, c in enumerate(g)] if i in (0, 3) else g for i, g in enumerate(found)]


def packs() -> list[dict[str, torch.Tensor]]:
    """Positions `[3, T]`, `[T]`, or none."""
    given = [reference.pack(group, PACK_LENGTH) for group in groups()]
    for index in (0, 3):
        given[index]["position_ids"] = torch.full((3, PACK_LENGTH), ANY)
        joined = torch.cat([c.position_ids for c in groups()[index] if c.position_ids is not None], dim=1)
        given[index]["position_ids"][:, : joined.shape[1]] = joined
    counts = [place for c in groups()[1] for place in range(len(c.tokens))]
    given[1]["position_ids"] = torch.tensor(counts + [ANY] * (PACK_LENGTH - len(counts)), dtype=torch.int32)
    return given


def padded_batches() -> list[dict[str, torch.Tensor]]:
    """Positions `[3, B, S]`, `[B, S]`, or none."""
    given = [reference.padded_batch(group) for group in groups()]
    for index in (0, 3):
        kept = given[index]["attention_mask"].bool()
        given[index]["position_ids"] = torch.full((3, *kept.shape), ANY, dtype=torch.int32)
        for row, c in enumerate(groups()[index]):
            assert c.position_ids is not None
            given[index]["position_ids"][:, row, kept[row]] = c.position_ids.int()
    kept = given[1]["attention_mask"].bool()
    given[1]["position_ids"] = torch.where(kept, kept.long().cumsum(1) - 1, ANY)
    return given


def rows(cp: int, known: bool) -> list[dict[str, torch.Tensor]]:
    """One of each rank: positions `[cp, 3, 1, T / cp]`, `[cp, 1, T / cp]`, or none; `known`: padding is."""
    given = [row_without_positions(group, cp, known) for group in groups()]
    for index in (0, 1, 3):
        axes: list[list[list[int]]] = []
        for axis in range(1 if index == 1 else 3):
            hands: list[list[int]] = [[] for _ in range(cp)]
            ends = given[index]["cu_seqlens"].tolist()
            for (start, end), c in zip(pairwise(ends), [*groups()[index], None], strict=True):
                place = list(range(end - start))
                if c is not None and c.position_ids is not None:
                    place[: len(c.tokens)] = c.position_ids[axis].tolist()
                if known and c is not None:
                    place[len(c.tokens) :] = [ANY] * (len(place) - len(c.tokens))
                deal(place, hands)
            axes.append(hands)
        given[index]["position_ids"] = torch.tensor(axes).transpose(0, 1)[:, :, None]
    given[1]["position_ids"] = given[1]["position_ids"][:, 0]
    return given


def check(
    pool: Pool, layout: Layout, folder: Path, *batches: Sequence[dict[str, torch.Tensor]], **options: Any
) -> None:
    """Logits, losses and gradients of these batches, each in a step of its own, are those of transformers."""
    padded = {**options, **VARIABLE} if layout.pp > 1 else {**options, "moe_token_dispatcher_type": "alltoall"}
    runs = [(folder, batch, padded if "attention_mask" in batch[0] else options) for batch in batches]
    for results in zip(*pool.run(ranks.run_variants, layout, runs=runs), strict=True):
        compare(results, layout, folder, groups()).check()


def test_the_positions_of_the_tests_matter(folders: dict[str, Path]) -> None:
    given = groups()[0][:1]
    plain = [replace(c, position_ids=None) for c in given]
    for folder in (folders["dense"], folders["linear"]):
        logits, others = (reference.run_transformers(folder, x).logits[0] for x in (given, plain))
        assert reference.relative_error(logits, others) > 0.01


LAYOUTS = pytest.mark.layouts
PACKED = [
    ("dense-mtp", Layout(), True),
    ("dense", Layout(tp=2, sp=True, world=2), True),
    ("dense-mtp", Layout(pp=2, vpp=2, world=2), True),
    ("linear-mtp", CP2, False),
    pytest.param("dense-mtp", CP2, False, marks=LAYOUTS),
    pytest.param("dense-mtp", Layout(tp=2, sp=True, pp=2, cp=2, world=8), False, marks=LAYOUTS),
    pytest.param("dense", Layout(pp=2, world=2), True, marks=LAYOUTS),
    pytest.param("experts-mtp", Layout(tp=2, sp=True, ep=2, etp=1, world=2), True, marks=LAYOUTS),
    pytest.param("experts", Layout(ep=2, cp=2, pp=2, world=4), False, marks=LAYOUTS),
    pytest.param("linear-mtp", Layout(), True, marks=LAYOUTS),
    pytest.param("linear", Layout(tp=2, sp=True, pp=2, vpp=2, world=4), True, marks=LAYOUTS),
]


@pytest.mark.parametrize(("kind", "layout", "padded"), PACKED, ids=str)
def test_packs_and_padded_batches_equal_transformers(
    pool: Pool, folders: dict[str, Path], kind: str, layout: Layout, padded: bool
) -> None:
    check(pool, layout, folders[kind], packs(), *[padded_batches()] * padded)


PARTS = [
    ("dense", CP2),
    pytest.param("linear", CP2, marks=LAYOUTS),
    pytest.param("dense", Layout(cp=2, tp=2, sp=True, world=4), marks=LAYOUTS),
    pytest.param("dense", Layout(cp=2, pp=2, vpp=2, world=4), marks=LAYOUTS),
]


@pytest.mark.parametrize(("kind", "layout"), PARTS, ids=str)
def test_parts_of_rows_equal_transformers(pool: Pool, folders: dict[str, Path], kind: str, layout: Layout) -> None:
    check(pool, layout, folders[kind], rows(2, known=True), rows(2, known=False), step=position_ranks.row_step)


def calls(row: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The arguments of each of two ranks."""
    cut = ("input_ids", "labels", "position_ids")
    parts = [{key: value for key, value in row.items() if key not in cut} for _ in range(2)]
    for rank, part in enumerate(parts):
        part |= {"input_ids": row["input_ids"][rank : rank + 1], "position_ids": row["position_ids"][rank]}
    return parts


def whole(row: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of a rank that is given the whole row, segment by segment."""
    tokens, positions = [], []
    ends, parts = row["cu_seqlens"].tolist(), calls(row)
    for start, end in pairwise(ends):
        chunk, at = (end - start) // 4, start // 2
        order = [(0, at), (1, at), (1, at + chunk), (0, at + chunk)]
        tokens += [parts[rank]["input_ids"][:, i : i + chunk] for rank, i in order]
        positions += [parts[rank]["position_ids"][..., i : i + chunk] for rank, i in order]
    return parts[0] | {"input_ids": torch.cat(tokens, 1), "position_ids": torch.cat(positions, -1)}


def text(row: int | None) -> list[dict[str, Any]]:
    """Two ranks' parts of 16 tokens of text, whose positions are compared; those of a token of rank 1 have this row."""
    parts = [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
    positions = torch.tensor([[part] * 3 for part in parts])[:, :, None]
    if row is not None:
        positions[1, row, 0, 0] += 1
    common = {"input_ids": torch.full((1, 8), 50), "cu_seqlens": [0, 16], "check": True}
    return [common | {"position_ids": mine} for mine in positions]


def test_every_rank_takes_parts_and_whole_rows_or_raises_the_same_error(pool: Pool, folders: dict[str, Path]) -> None:
    given, counted, _, _ = rows(2, known=True)
    good = calls(given)
    only = {key: value for key, value in good[1].items() if key != "position_ids"}
    entire = whole(given)
    short, floats = good[1]["position_ids"][..., 1:], good[1]["position_ids"].float()
    off = calls(counted)
    off[1]["position_ids"] = off[1]["position_ids"].clone()
    off[1]["position_ids"][0, 0] += 1
    pack = {key: value[None] for key, value in packs()[0].items()}
    faults = {
        "position_ids: expected [3, 1, 64] (time, row, column) or [1, 64], as there are 1 x 64 tokens, found "
        "[3, 1, 63]": [good[0], good[1] | {"position_ids": short}],
        "found [3, 1, 128]": [good[0], good[1] | {"position_ids": entire["position_ids"]}],
        "expected integers, found torch.float32 [3, 1, 64]": [good[0], good[1] | {"position_ids": floats}],
        "expected a tensor of integers, found list": [good[0], good[1] | {"position_ids": [1]}],
        "ranks 0 and 1 of 2 have different batches: they differ in position_ids": [good[0], only],
        "they differ in position_ids (none": [calls(counted)[0], calls(counted)[1] | {"check": True}],
        "context-parallel rank 1: position_ids: token 9 of segment 0 has position 10, expected 9 (1 of": off,
        "context-parallel rank 0: position_ids: token 0 of segment 0 has position [": [
            x | {"check": True} for x in good
        ],
        "1 of 2 context-parallel ranks cannot take their batch; context-parallel rank 1: position_ids: token 4 of "
        "segment 0 has position [4, 5, 4], expected [4, 4, 4] (1 of": text(row=1),
        "expected [0, 0, 0] (": [{"pack": pack, "check": True}] * 2,
        "expected [3, 1, 128] (time": [entire | {"position_ids": entire["position_ids"][:, :, 1:]}] * 2,
    }
    accepted = [good, [entire] * 2, calls(counted), [whole(counted)] * 2, [{"pack": pack}] * 2, text(row=None)]
    first, second = pool.run(position_ranks.answers, CP2, folder=folders["dense"], calls=[*faults.values(), *accepted])
    for message, one, other in zip(faults, first, second, strict=False):
        assert one == other
        assert isinstance(one, str)
        assert message in one
    # Padding aside, a part gives what the whole row gives, whether positions are given or computed.
    for found in (first[-6:], second[-6:]):
        assert all(isinstance(x, torch.Tensor) for x in found)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[2], found[3])
        assert not torch.equal(found[0], found[2])


def test_padded_batches_with_other_positions_are_rejected(pool: Pool, folders: dict[str, Path]) -> None:
    given, counted, plain, _ = ({k: v for k, v in batch.items() if k != "labels"} for batch in padded_batches())
    batch, width = given["input_ids"].shape
    # The first sample is padded on the left, the second on the right.
    first = int(counted["attention_mask"][0].argmax())
    naive = torch.arange(counted["input_ids"].shape[1]).expand(counted["input_ids"].shape)
    zeros = torch.zeros_like(plain["input_ids"]).expand(3, -1, -1)
    faults: dict[str, dict[str, Any]] = {
        f"position_ids: expected [3, {batch}, {width}] (time, row, column) or [{batch}, {width}], as there are": given
        | {"position_ids": given["position_ids"][:2]},
        f"found [3, 1, {width}]": given | {"position_ids": given["position_ids"][:, :1]},
        "expected integers, found torch.float32": given | {"position_ids": given["position_ids"].float()},
        f"token 0 of segment 0 has position {first}, expected 0": counted | {"position_ids": naive},
        "token 1 of segment 0 has position [0, 0, 0], expected [1, 1, 1]": plain
        | {"position_ids": zeros, "check": True},
        "or a pack as `inputs`, not both": {"inputs": object(), "position_ids": zeros},
    }
    accepted: list[dict[str, Any]] = [plain, plain | {"position_ids": zeros}, counted | {"check": True}]
    found = pool.run(
        position_ranks.answers, Layout(), folder=folders["dense"], calls=[[x] for x in [*faults.values(), *accepted]]
    )[0]
    for message, error in zip(faults, found, strict=False):
        assert isinstance(error, str)
        assert message in error
    assert all(isinstance(logits, torch.Tensor) for logits in found[-3:])
    assert not torch.equal(found[-3], found[-2])


def test_the_argument_has_the_model_compare_positions(pool: Pool, folders: dict[str, Path]) -> None:
    for words, compared in (([], False), (["--check-position-ids"], True)):
        assert pool.run(position_ranks.provided, Layout(), folder=folders["dense"], words=words) == [compared]
