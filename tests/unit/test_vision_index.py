"""Parts of a pack: positions and the tower's rows from counts alone; what does not match is rejected on every rank."""

from dataclasses import replace

import pytest
import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.positions import mrope_positions
from megatron_vlbridge.layout.vision_index import ShardedPack
from megatron_vlbridge.layout.zigzag import zigzag_index
from megatron_vlbridge.model.inputs import Media, ThdBatch
from megatron_vlbridge.model.inputs.thd_shard import ThdShard
from tests.unit.random_batches import CONFIG, FILLER, IMAGE, VIDEO

WORD = 50
NO_GRID = torch.zeros(0, 3, dtype=torch.int64)


def kinds_of(tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack((tokens == IMAGE, tokens == VIDEO))


def answer(tokens: torch.Tensor, segments: tuple[int, ...], cp: int, images: list, videos: list) -> str:
    """The error of a pack cut over `cp` ranks, or nothing."""
    try:
        pack = ShardedPack(segments, cp, images, videos, 2)
        pack.check([pack.count(kinds_of(tokens[zigzag_index(segments, cp, rank)])) for rank in range(cp)])
    except VLBridgeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize(
    ("placeholders", "images", "videos"),
    [
        ([IMAGE] * 6, [(1, 4, 6)], []),
        ([IMAGE] * 4 + [IMAGE] * 6, [(1, 4, 4), (1, 4, 6)], []),
        ([IMAGE] * 8, [(2, 4, 4)], []),
        ([VIDEO] * 4 + [WORD] + [VIDEO] * 4, [], [(2, 4, 4)]),
        ([VIDEO] * 8, [], [(2, 4, 4)]),
        ([IMAGE] * 3 + [VIDEO] * 4 + [IMAGE] * 2, [(1, 2, 6), (1, 4, 2)], [(1, 4, 4)]),
    ],
    ids=["image", "two that touch", "image of two frames", "video", "frames that touch", "image, video, image"],
)
def test_wherever_chunks_cut_an_image_each_part_equals_the_whole(
    placeholders: list[int], images: list, videos: list, cp: int
) -> None:
    length = 24
    for before in range(length - len(placeholders) + 1):
        words = [WORD] * before, [WORD] * (length - before - len(placeholders))
        # A segment with an image before, so that counts do not begin at 0.
        tokens = torch.tensor([*[IMAGE] * 2, *[WORD] * 6, *words[0], *placeholders, *words[1]])
        segments, grids = (8, length), [(1, 2, 4), *images]
        whole = mrope_positions(
            tokens,
            segments,
            torch.tensor(grids),
            torch.tensor(videos) if videos else NO_GRID,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            merge_size=2,
        )
        features = torch.full((len(tokens),), -1)
        places = torch.cat([(tokens == i).nonzero().flatten() for i in (IMAGE, VIDEO)])
        features[places] = torch.arange(len(places))
        parts = [zigzag_index(segments, cp, rank) for rank in range(cp)]
        pack = ShardedPack(segments, cp, grids, videos, 2)
        counts = [pack.count(kinds_of(tokens[part])) for part in parts]
        pack.check(counts)
        for rank, part in enumerate(parts):
            found = pack.places(kinds_of(tokens[part]), counts, rank)
            assert torch.equal(found.position_ids, whole[:, part])
            assert torch.equal(found.vision_token_index, (features[part] >= 0).nonzero().flatten())
            assert torch.equal(found.vision_embed_index, features[part][features[part] >= 0])


def test_what_a_rank_sends_is_a_few_integers_however_long_the_pack() -> None:
    segments = (4096, 4096)
    tokens = torch.full((8192,), WORD)
    tokens[100:1124] = IMAGE
    counts = ShardedPack(segments, 2, [(1, 64, 64)], [], 2).count(kinds_of(tokens[zigzag_index(segments, 2, 0)]))
    assert counts.placeholders.tolist() == [[[924, 0], [0, 0]], [[0, 0], [0, 0]]]
    # Text stands before and after the image; of videos there are none in any of the four runs.
    assert counts.stops.tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 3, 0], *[[1, run, 0] for run in range(4)]]


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_any_other_token_inside_an_image_is_rejected_wherever_it_lies(cp: int) -> None:
    """And so is every mix of two kinds: as the check of the whole pack says."""
    for place in range(1, 6):
        for other in (WORD, VIDEO):
            ids = [WORD] * 3 + [IMAGE] * place + [other] + [IMAGE] * (6 - place) + [WORD] * 6
            videos = [(1, 2, 2)] if other == VIDEO else []
            found = answer(torch.tensor(ids), (16,), cp, [(1, 4, 6)], videos)
            assert "segment 0: image 0 with grid (1, 4, 6) needs 6 placeholder tokens in a row" in found
            assert f"after {place} of them context-parallel rank" in found


def batch(**changes: object) -> ThdBatch:
    """Rank 1's part of a pack of two segments, cut over two ranks: an image in the second."""
    media = Media(torch.zeros(16, CONFIG.vision.patch_dim), torch.tensor([[1, 4, 4]]))
    ids = [WORD, WORD, WORD, WORD, IMAGE, IMAGE, WORD, WORD]
    return replace(ThdBatch(torch.tensor([ids]), [0, 8, 16], media, torch.tensor([[WORD] * 8])), **changes)


def other_batch(**changes: object) -> ThdBatch:
    """Rank 0's part of the same pack."""
    ids = [WORD, WORD, WORD, WORD, IMAGE, IMAGE, WORD, WORD]
    return replace(batch(tokens=torch.tensor([ids])), **changes)


def both(first: ThdBatch, second: ThdBatch) -> list[str]:
    """What each of two ranks answers once both have statuses of each other."""
    ranks = [ThdShard(each, CONFIG, 2, rank) for rank, each in enumerate((first, second))]
    answers = []
    for rank in ranks:
        try:
            rank.inputs([each.status for each in ranks])
            answers.append("")
        except VLBridgeError as error:
            answers.append(str(error))
    return answers


def test_matching_batches_pass() -> None:
    assert both(other_batch(), batch()) == ["", ""]


TWO = Media(torch.zeros(32, CONFIG.vision.patch_dim), torch.tensor([[1, 4, 4], [1, 4, 4]]))
NONE = Media()
SHORT = torch.tensor([[WORD, WORD, WORD, WORD, IMAGE, WORD, WORD, WORD]])
EARLY = torch.tensor([[WORD, WORD, IMAGE, IMAGE, WORD, WORD, WORD, WORD]])
WHOLE = torch.tensor([[WORD] * 10 + [IMAGE] * 4 + [WORD] * 2])
TEXT = torch.full((1, 8), WORD)
PER_SEGMENT = replace(batch().media, images_per_segment=torch.tensor([1, 0]))
TOGETHER = {
    "too few placeholders": (
        {"tokens": SHORT},
        {},
        r"segment 1: found 3 image .*ranks: \[1, 2\].*needs 4 tokens, but only 3",
    ),
    "none": ({"tokens": TEXT}, {"tokens": TEXT}, r"image 0 with grid \(1, 4, 4\) has no placeholders.*in all 0 image"),
    "too many": (
        {"media": NONE},
        {"media": NONE},
        r"segment 1: found 4 image .*make 0 tokens; in all 4 image .*and 0 grids that make 0",
    ),
    "a grid too many": (
        {"media": TWO},
        {"media": TWO},
        r"image 1 .* has no placeholders.*in all 4 image .*2 grids that make 8",
    ),
    "cut by the end": (
        {},
        {"tokens": EARLY},
        r"segment 0: found 2 image .*ranks: \[0, 2\].*image 0 .*but only 2 .*all grids of the pack in order",
    ),
    "other grids": ({}, {"media": TWO}, "ranks 0 and 1 of 2 have different batches: they differ in image grids"),
    "other segments": ({}, {"cu_seqlens": [0, 4, 16]}, "they differ in cu_seqlens"),
    "whole and part": ({}, {"tokens": WHOLE, "labels": WHOLE}, r"they differ in a whole pack or a part"),
    "labels on one": ({}, {"labels": None}, "they differ in labels or none"),
    "wrong counts": ({"media": PER_SEGMENT}, {"media": PER_SEGMENT}, r"segment 0: found 0 .* 1 images .*make 4"),
}


@pytest.mark.parametrize(("first", "second", "message"), TOGETHER.values(), ids=TOGETHER.keys())
def test_batches_that_do_not_match_are_rejected_on_every_rank_alike(first: dict, second: dict, message: str) -> None:
    answers = both(other_batch(**first), batch(**second))
    assert answers[0] == answers[1]
    with pytest.raises(VLBridgeError, match=message):
        raise VLBridgeError(answers[0])


ALONE = {
    "neither whole nor part": (
        {"tokens": TEXT[:, :6]},
        r"the packed batch has 6 tokens, but cu_seqlens ends at 16: expected 16 .*8",
    ),
    "no row": ({"tokens": TEXT[0]}, r"int64 \[1, T\], found torch.int64 \[8\]"),
    "a segment that cannot be cut": ({"cu_seqlens": [0, 6, 16]}, "segment 0 has 6 tokens .*needs a multiple of 4"),
    "segments out of order": ({"cu_seqlens": [0, 12, 8, 16]}, "segment 1 begins at 12 and ends at 8"),
    "an empty segment": ({"cu_seqlens": torch.tensor([0, 8, 16, 16])}, "segment 2 begins at 16 and ends at 16"),
    "no start": ({"cu_seqlens": [8, 16]}, r"cu_seqlens holds 0 .*found \(8, 16\)"),
    "a table of bounds": ({"cu_seqlens": torch.tensor([[0, 16]])}, r"integers \[n\], found torch.int64 \[1, 2\]"),
    "too few lengths": ({"lengths": [8]}, "expected one for each of the 2 segments, found 1"),
    "a length beyond its segment": (
        {"lengths": [8, 9]},
        "segment 1 has 9 tokens without padding; cu_seqlens gives it 8",
    ),
    "a label in the padding": ({"lengths": [4, 8]}, "labels: 2 tokens of the padding have a label, the first is 50"),
    "labels of another shape": ({"labels": TEXT[:, :4]}, r"labels: expected int64 \[1, 8\]"),
    "a token outside the vocabulary": ({"tokens": TEXT + 100}, "tokens: 8 ids lie outside the vocabulary of 128"),
    "patches of another grid": (
        {"media": replace(batch().media, pixel_values=torch.zeros(8, CONFIG.vision.patch_dim))},
        r"image patches: the 1 grids \[\(1, 4, 4\)\] stand for 16 patches",
    ),
    "a grid that cannot be merged": (
        {"media": Media(torch.zeros(3, CONFIG.vision.patch_dim), torch.tensor([[1, 1, 3]]))},
        r"image 0: grid \(1, 1, 3\): expected .* divisible by the merge size 2",
    ),
}


@pytest.mark.parametrize(("changes", "message"), ALONE.values(), ids=ALONE.keys())
def test_an_invalid_batch_is_rejected_with_its_values(changes: dict, message: str) -> None:
    with pytest.raises(VLBridgeError, match=message):
        ThdShard(batch(**changes), CONFIG, 2, 1)


def test_padding_of_known_length_may_hold_any_token() -> None:
    """Rank 0 of two holds the first and the last quarter of each segment."""
    tokens = torch.tensor([[WORD, WORD, IMAGE, -1, WORD, WORD, VIDEO, 999]])
    inputs = ThdShard(ThdBatch(tokens, [0, 8, 16], lengths=[6, 6]), CONFIG, 2, 0)
    text = ThdShard(ThdBatch(TEXT, [0, 8, 16], lengths=[6, 6]), CONFIG, 2, 1)
    found = inputs.inputs([inputs.status, text.status])
    assert found.tokens.tolist() == [[WORD, WORD, FILLER, FILLER, WORD, WORD, FILLER, FILLER]]
    assert found.position_ids[0, 0].tolist() == [0, 1, 6, 7, 0, 1, 6, 7]
