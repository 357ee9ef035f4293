"""Positions that come with a batch, in random packs: each rank holds those of its tokens, or names the wrong token."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.model.inputs import GivenPositions, PackedInputs, ThdBatch
from megatron_vlbridge.model.inputs.thd_shard import ThdShard
from tests.errors import rejects
from tests.unit.random_batches import CONFIG, FILLER, Batch, Token, cut, random_batch, rows_of, walk

BATCHES, ANY = 50, 31337


@dataclass
class Case:
    """A rank that is given a batch: the tokens that it is given and holds, and what it makes of positions `[.., 1, T]`.

    `known`: it can tell what is padding.
    """

    given: list[Token]
    held: list[Token]
    known: bool
    use: Callable[[GivenPositions], torch.Tensor]

    def counted(self, token: Token) -> bool:
        """Whether a token's position is looked at."""
        return not (token.padding and self.known)

    def positions(self, dims: int) -> GivenPositions:
        """Those of the given tokens: of text, row and column, or their places; any for padding."""
        rows = [t.position if dims == 3 else (t.place,) for t in self.given]
        rows = [row if self.counted(t) else (ANY,) * len(row) for t, row in zip(self.given, rows, strict=True)]
        return GivenPositions(torch.tensor(rows).T[:, None] if dims == 3 else torch.tensor(rows).T, compared=True)

    def check(self, found: torch.Tensor) -> None:
        """The rank has the positions of the tokens that it holds."""
        assert found.shape == (3, 1, len(self.held))
        for token, position in zip(self.held, found[:, 0].T.tolist(), strict=True):
            assert not self.counted(token) or tuple(position) == token.position


def part(batch: Batch, known: bool) -> Case:
    """Of a row cut among the ranks: the last with more than padding; the others have the right positions."""
    segments = walk(batch)
    tokens = [cut(segments, batch.cp, rank) for rank in range(batch.cp)]
    chosen = max(rank for rank, held in enumerate(tokens) if not all(token.padding for token in held))
    case = Case(tokens[chosen], tokens[chosen], known, lambda given: use(given))

    def use(given: GivenPositions) -> torch.Tensor:
        shards = []
        for rank, held in enumerate(tokens):
            ids, labels = rows_of(held)
            mine = given if rank == chosen else replace(case, given=held).positions(given.ids.dim())
            mine = replace(mine, compared=given.compared)
            row = ThdBatch(ids, batch.cu_seqlens, batch.media(), labels, batch.lengths if known else None, mine)
            shards.append(ThdShard(row, CONFIG, batch.cp, rank))
        statuses = [shard.status for shard in shards]
        shard = shards[chosen]
        found = shard.inputs(statuses)
        assert shard.compares_positions == (given.compared and batch.cp > 1)
        return (
            shard.with_compared_positions(statuses).inputs(statuses) if shard.compares_positions else found
        ).position_ids

    return case


def whole_row(batch: Batch, known: bool) -> Case:
    """A row with all its padding."""
    segments, rank = walk(batch), batch.cp - 1
    ids, labels = rows_of(cut(segments, 1, 0))

    def use(given: GivenPositions) -> torch.Tensor:
        row = ThdBatch(ids, batch.cu_seqlens, batch.media(), labels, batch.lengths if known else None, given)
        shard = ThdShard(row, CONFIG, batch.cp, rank)
        return shard.inputs([shard.status] * batch.cp).position_ids

    return Case(cut(segments, 1, 0), cut(segments, batch.cp, rank), known, use)


def pack(batch: Batch, _: bool) -> Case:
    """Without padding between segments, which a rank adds."""
    for segment in batch.segments:
        step = 2 * batch.cp if batch.cp > 1 else 1
        segment.padded = -(-len(segment.ids) // step) * step
    segments, rank = walk(batch), batch.cp - 1
    dense = [token for segment in segments for token in segment if not token.padding]
    spare = -sum(s.padded for s in batch.segments) % (2 * batch.cp) + 2 * batch.cp
    tail = [Token(FILLER, padding=True) for _ in range(spare)]
    total = sum(s.padded for s in batch.segments) + spare
    row = dense + [Token(FILLER, padding=True) for _ in range(total - len(dense))]
    layout = BatchLayout.packed(batch.lengths, total)
    whole = PackedInputs.from_pack(layout, rows_of(row)[0], batch.media(), CONFIG)
    held = cut([*segments, tail], batch.cp, rank)

    def use(given: GivenPositions) -> torch.Tensor:
        return whole.with_positions(given).context_parallel(batch.cp, rank, CONFIG).position_ids

    return Case(row, held, True, use)


def padded_batch(batch: Batch, _: bool) -> Case:
    """Rows with padding on either side."""
    width, table = max(batch.lengths) + 2, []
    for row, segment in enumerate(walk(batch)):
        held = [token for token in segment if not token.padding]
        padding = [Token(FILLER, padding=True) for _ in range(width - len(held))]
        table.append([*padding, *held] if row % 2 else [*held, *padding])
    ids = torch.tensor([[t.id for t in row] for row in table])
    mask = torch.tensor([[not t.padding for t in row] for row in table])
    whole = PackedInputs.from_padded(ids, mask.long(), batch.media(), CONFIG, multiple_of=batch.tp)
    tokens = [token for row in table for token in row]

    def use(given: GivenPositions) -> torch.Tensor:
        given = replace(given, ids=given.ids.view(*given.ids.shape[:-2], *mask.shape))
        found = whole.with_positions(given.packed(whole.layout)).position_ids
        assert found.shape[-1] % batch.tp == 0
        return found[:, :, : int(mask.sum())]

    return Case(tokens, [token for token in tokens if not token.padding], True, use)


FORMS = [part, whole_row, pack, padded_batch]


def cases(form: Callable[[Batch, bool], Case]) -> Iterator[tuple[Case, random.Random]]:
    for seed in range(BATCHES):
        yield form(random_batch(seed), bool(seed % 2)), random.Random(seed)


def changed(case: Case, given: GivenPositions, rng: random.Random) -> tuple[GivenPositions, str]:
    """With other positions of some tokens, and what an error says of the first."""
    tokens = [place for place, token in enumerate(case.given) if case.counted(token)]
    places = sorted(rng.sample(tokens, min(len(tokens), rng.choice([1, 1, 2, 5]))))
    ids, first = given.ids.clone(), case.given[places[0]]
    for place in places:
        axis = rng.randrange(len(ids))
        ids[(axis, 0, place) if ids.dim() == 3 else (0, place)] += rng.choice([-3, -1, 1, 2])
    found = ids.view(-1, len(case.given))[:, places[0]].tolist()
    expected = list(first.position) if ids.dim() == 3 else [first.place]
    values = (found, expected) if ids.dim() == 3 else (found[0], expected[0])
    return replace(given, ids=ids), (
        f"position_ids: token {first.place} of segment {first.segment} has position {values[0]}, expected {values[1]} "
        f"({len(places)} of {len(tokens)} tokens differ)"
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_holds_the_given_positions_of_its_tokens(form: Callable[[Batch, bool], Case]) -> None:
    for case, rng in cases(form):
        for token in case.given:
            token.position = (rng.randint(-50, 5000), rng.randint(0, 99), rng.randint(0, 99))
        case.check(case.use(replace(case.positions(3), compared=False)))


@pytest.mark.parametrize("form", FORMS)
def test_counts_of_each_segment_are_taken_for_none(form: Callable[[Batch, bool], Case]) -> None:
    for case, rng in cases(form):
        given = case.positions(2)
        case.check(case.use(given))
        given, message = changed(case, given, rng)
        with rejects(message, "2-D positions say nothing about images", start="position_ids: token"):
            case.use(replace(given, compared=bool(rng.randrange(2))))


@pytest.mark.parametrize("form", FORMS)
def test_other_positions_than_the_computed_ones_are_named_where_they_are_compared(
    form: Callable[[Batch, bool], Case],
) -> None:
    for case, rng in cases(form):
        given = case.positions(3)
        case.check(case.use(given))
        given, message = changed(case, given, rng)
        with rejects(message, "as computed", "check_position_ids is set", start="position_ids: token"):
            case.use(given)
        case.use(replace(given, compared=False))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_integers_of_any_size_are_positions(dtype: torch.dtype) -> None:
    given = GivenPositions.of(torch.tensor([[0, 1, -2]], dtype=dtype))
    assert given is not None
    assert given.ids.dtype == torch.int64
    assert given.ids.tolist() == [[0, 1, -2]]
    assert not given.compared
    assert GivenPositions.of(None, compared=True) is None


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.zeros(1, 4), "torch.float32 [1, 4]"),
        (torch.zeros(3, 1, 4, dtype=torch.bool), "torch.bool [3, 1, 4]"),
        (torch.zeros(4, dtype=torch.complex64), "torch.complex64 [4]"),
        ([[0, 1]], "found list"),
    ],
)
def test_what_is_no_tensor_of_integers_is_rejected(ids: object, found: str) -> None:
    with rejects("expected", "integers", found, start="position_ids: "):
        GivenPositions.of(ids)


@pytest.mark.parametrize("shape", [(4,), (5,), (1, 5), (2, 4), (3, 4), (3, 4, 1), (4, 1, 4), (2, 1, 4), (3, 1, 5)])
def test_another_shape_is_rejected(shape: tuple[int, ...]) -> None:
    given = GivenPositions(torch.zeros(shape, dtype=torch.int64))
    words = ("[3, 1, 4]", "[1, 4]", "1 x 4 tokens", f"found {list(shape)}")
    with rejects(*words, start="position_ids: expected"):
        given.check(BatchLayout.packed([2, 1], 4))
    with rejects(*words, start="position_ids: expected"):
        given.packed(BatchLayout.from_padded(torch.ones(1, 4)))
    tokens = torch.full((1, 4), 50)
    with rejects(*words, start="position_ids: expected"):
        ThdShard(ThdBatch(tokens, [0, 8], positions=given), CONFIG, 2, 0)


def test_ranks_with_other_kinds_of_positions_are_rejected_alike() -> None:
    ids = torch.full((1, 4), 50)
    axes = GivenPositions(torch.zeros(3, 1, 4, dtype=torch.int64))
    kinds = [None, axes, replace(axes, compared=True)]
    kinds += [GivenPositions(torch.tensor([[0, 1, 6, 7]])), GivenPositions(torch.tensor([[0, 1, 6, 7]]), compared=True)]
    for one in kinds:
        for other in kinds:
            first = ThdShard(ThdBatch(ids, [0, 8], positions=one), CONFIG, 2, 0)
            second = (
                GivenPositions(torch.tensor([[2, 3, 4, 5]]), other.compared)
                if other and other.ids.dim() == 2
                else other
            )
            statuses = [first.status, ThdShard(ThdBatch(ids, [0, 8], positions=second), CONFIG, 2, 1).status]
            if one is other:
                first.inputs(statuses)
                continue
            with pytest.raises(VLBridgeError, match=r"ranks 0 and 1 of 2 .*they differ in position_ids"):
                first.inputs(statuses)
