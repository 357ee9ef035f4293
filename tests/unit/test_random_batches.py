"""10,000 random packs, whole and cut: every rank holds what a walk over the tokens says."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.layout.zigzag import pack_order, zigzag_index
from megatron_vlbridge.model.inputs import PackedInputs, ThdBatch
from megatron_vlbridge.model.inputs.thd_shard import ThdShard
from tests.unit.random_batches import CONFIG, FILLER, IMAGE, Batch, Token, cut, random_batch, rows_of, walk

BATCHES, PARTS = 10_000, 10
# Where the true lengths are known, padding may be anything, even a placeholder.
PADDING = {True: IMAGE, False: FILLER}
PREDICTING = replace(CONFIG, text=replace(CONFIG.text, num_mtp_layers=1))


def check(found: PackedInputs, expected: list[Token], tp: int, known: bool = True) -> None:
    """The rank's inputs are those of the tokens of the walk; `known`: it was told what is padding."""
    assert found.tokens.tolist() == [[t.id for t in expected]]
    assert found.position_ids.tolist() == [[list(axis)] for axis in zip(*(t.position for t in expected), strict=True)]
    assert found.labels is not None
    assert found.loss_mask is not None
    assert found.labels.tolist() == [[max(t.label, 0) for t in expected]]
    assert found.loss_mask.tolist() == [[float(t.label != -100) for t in expected]]
    rows = found.vision_token_index.tolist()
    features = list(range(len(rows))) if found.vision_embed_index is None else found.vision_embed_index.tolist()
    images = {place: t.feature for place, t in enumerate(expected) if t.feature is not None}
    assert dict(zip(rows, features, strict=True)) == images
    assert len(rows) == len(images)
    if known:
        assert (found.layout.gather_index < 0).tolist() == [t.padding for t in expected]
    if tp > 1:
        check_sequence_parallel(found, features, images, tp)


def check_sequence_parallel(found: PackedInputs, features: list[int], images: dict[int, int], tp: int) -> None:
    size = found.tokens.shape[1] // tp
    for rank in range(tp):
        shard = found.with_sequence_shard(tp, rank).shard
        assert shard is not None
        mine = dict(zip(shard.token_index.tolist(), (features[i] for i in shard.embed_index.tolist()), strict=True))
        inside = {place - rank * size: row for place, row in images.items() if place // size == rank}
        assert mine == inside


def check_prediction(found: PackedInputs, expected: list[Token], weight: float) -> None:
    """What the MTP layer gets: next tokens, the labels after them, and the pack's `weight` for each label."""
    assert found.mtp is not None
    assert found.mtp.labels is not None
    assert found.mtp.weights is not None
    assert found.mtp.tokens.tolist() == [[t.next_id for t in expected]]
    assert found.mtp.labels.tolist() == [[max(t.next_label, 0) for t in expected]]
    assert torch.equal(found.mtp.weights, torch.tensor([[weight * (t.next_label != -100) for t in expected]]))


def some_ranks(batch: Batch, count: int = 2) -> list[int]:
    """All ranks of about every tenth batch; of the others `count`, if there are, others for other batches."""
    rng = random.Random(str(batch.cu_seqlens))
    return list(range(batch.cp)) if rng.random() < 0.1 else rng.sample(range(batch.cp), min(batch.cp, count))


def check_cut(batch: Batch, known: bool) -> None:
    """Each rank is given its own part alone, and receives the statuses of the others; some ranks are then looked at."""
    segments, media = walk(batch), batch.media()
    lengths = batch.lengths if known else None
    parts = [cut(segments, batch.cp, rank) for rank in range(batch.cp)]
    ranks = [
        ThdShard(ThdBatch(ids, batch.cu_seqlens, media, labels, lengths), CONFIG, batch.cp, rank)
        for rank, (ids, labels) in enumerate(rows_of(part, PADDING[known]) for part in parts)
    ]
    assert all(rank.sharded == (batch.cp > 1) for rank in ranks)
    statuses = [rank.status for rank in ranks]
    for rank in some_ranks(batch):
        inputs = ranks[rank].inputs(statuses)
        assert inputs.layout.segments == tuple(segment.padded for segment in batch.segments)
        check(inputs, parts[rank], batch.tp, known)
        check_media(inputs, batch)


def check_media(found: PackedInputs, batch: Batch) -> None:
    """The tower runs the whole pack's images, then its videos, each with its own patches."""
    kinds = [[grid for segment in batch.segments for grid in getattr(segment, kind)] for kind in ("images", "videos")]
    assert found.frames.grids == tuple(grid for grids in kinds for grid in grids)
    media = batch.media()
    patches = [x for x in (media.pixel_values, media.pixel_values_videos) if x is not None]
    assert torch.equal(found.patches, torch.cat(patches))


def check_whole(batch: Batch, known: bool) -> None:
    """A rank is given the whole padded row, as all others are."""
    segments = walk(batch)
    ids, labels = rows_of(cut(segments, 1, 0), PADDING[known])
    row = ThdBatch(ids, torch.tensor(batch.cu_seqlens), batch.media(), labels, batch.lengths if known else None)
    for number in some_ranks(batch, count=1):
        rank = ThdShard(row, CONFIG, batch.cp, number)
        assert not rank.sharded
        inputs = rank.inputs([rank.status] * batch.cp)
        check(inputs, cut(segments, batch.cp, number), batch.tp, known)
        check_media(inputs, batch)


def check_dense(batch: Batch) -> None:
    """Each rank is given all conversations, and pads them itself."""
    total = sum(segment.padded for segment in batch.segments)
    for segment in batch.segments:
        step = 2 * batch.cp if batch.cp > 1 else 1
        segment.padded = -(-len(segment.ids) // step) * step
    segments = walk(batch)
    dense = [token for segment in segments for token in segment if not token.padding]
    spare = total - sum(len(segment) for segment in segments)
    # Under context parallelism padding is at position 0; else it counts as a segment of its own.
    tail = [Token(0, position=(0, 0, 0) if batch.cp > 1 else (i, i, i), padding=True) for i in range(spare)]
    segments.append(tail)
    if batch.cp > 1:
        for token in (t for s in segments for t in s if t.padding):
            token.position = (0, 0, 0)
    ids, labels = rows_of(dense + [Token(0)] * (total - len(dense)))
    layout = BatchLayout.packed(batch.lengths, total)
    pack = PackedInputs.from_pack(layout, ids, batch.media(), PREDICTING, labels)
    supervised = sum(t.label != -100 for t in dense)
    weight = supervised / max(1, sum(t.next_label != -100 for t in dense))
    for rank in some_ranks(batch):
        inputs, expected = pack.context_parallel(batch.cp, rank, PREDICTING), cut(segments, batch.cp, rank)
        check(inputs, expected, batch.tp)
        check_prediction(inputs, expected, weight)


def check_indices(batch: Batch) -> None:
    """The zigzag index gives the parts, and its inverse the pack."""
    padded = tuple(segment.padded for segment in batch.segments)
    places = [[Token(i) for i in range(s, e)] for s, e in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]
    parts = [[token.id for token in cut(places, batch.cp, rank)] for rank in range(batch.cp)]
    assert [zigzag_index(padded, batch.cp, rank).tolist() for rank in range(batch.cp)] == parts
    joined = [place for part in parts for place in part]
    assert [joined[i] for i in pack_order(padded, batch.cp).tolist()] == list(range(batch.cu_seqlens[-1]))


def parts() -> Iterator[Any]:
    """One of ten for `make test`, the others for `make test-layouts`."""
    for part in range(PARTS):
        yield pytest.param(part, marks=[pytest.mark.layouts] if part else [])


@pytest.mark.parametrize("part", list(parts()))
def test_every_rank_holds_what_a_walk_over_the_tokens_says(part: int) -> None:
    for seed in range(part * BATCHES // PARTS, (part + 1) * BATCHES // PARTS):
        batch = random_batch(seed)
        form = random.Random(f"form {seed}").choice(["cut", "cut", "whole", "dense", "dense"])
        try:
            if batch.cp > 1:
                check_indices(batch)
            if form == "dense":
                check_dense(batch)
            else:
                (check_cut if form == "cut" else check_whole)(batch, known=bool(seed % 2))
        except Exception as error:
            raise AssertionError(f"batch {seed}, {form}: {error}") from error


def test_the_random_batches_hold_every_kind() -> None:
    """Else the test above would prove less than it says."""
    batches = [random_batch(seed) for seed in range(1000)]
    assert {b.cp for b in batches} == set(range(1, 9))
    assert {b.tp for b in batches} == {1, 2, 4}
    segments = [s for b in batches for s in b.segments]
    assert any(s.images and s.videos for s in segments)
    assert any(not s.images and not s.videos for s in segments)
    assert any(frames > 1 for s in segments for frames, _, _ in s.images)
    parts = [cut(walk(b), b.cp, r) for b in batches[:200] if b.cp > 1 for r in range(b.cp)]
    assert any(part[0].feature is not None for part in parts)
    assert any(all(t.feature is None for t in part) for part in parts)
