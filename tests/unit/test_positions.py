"""MRoPE positions: equal to a token-by-token count and to transformers; invalid input is rejected with its values."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.positions import mrope_positions

IMAGE, VIDEO, START, END, PAD = 10, 11, 8, 9, 0
MERGE = 2
NO_GRID = torch.zeros(0, 3, dtype=torch.int64)


@dataclass(frozen=True)
class Segment:
    """Tokens of one conversation and its grids, in patches."""

    tokens: list[int]
    images: list[list[int]]
    videos: list[list[int]]


@dataclass(frozen=True)
class Pack:
    segments: list[Segment]
    padding: int

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([t for s in self.segments for t in s.tokens] + [PAD] * self.padding, dtype=torch.int64)

    @property
    def lengths(self) -> list[int]:
        return [len(s.tokens) for s in self.segments]

    def grids(self, kind: str) -> Tensor:
        return torch.tensor([g for s in self.segments for g in getattr(s, kind)], dtype=torch.int64).reshape(-1, 3)

    def positions(self, **kwargs: list[int]) -> Tensor:
        return mrope_positions(
            self.tokens,
            self.lengths,
            self.grids("images"),
            self.grids("videos"),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            merge_size=MERGE,
            **kwargs,
        )


def positions_of(tokens: list[int], lengths: list[int], images: list, videos: list | None = None) -> Tensor:
    grids = [torch.tensor(g) if g else NO_GRID for g in (images, videos or [])]
    return mrope_positions(
        torch.tensor(tokens), lengths, *grids, image_token_id=IMAGE, video_token_id=VIDEO, merge_size=MERGE
    )


def placeholders(token: int, grid: list[int]) -> list[int]:
    return [token] * (grid[0] * (grid[1] // MERGE) * (grid[2] // MERGE))


side = st.integers(1, 4).map(lambda n: n * MERGE)
text = st.lists(st.integers(12, 99), min_size=1, max_size=4)


@st.composite
def segments(draw: st.DrawFn, adjacent: bool) -> Segment:
    """Text, images, videos in any order; `adjacent`: images may touch, and a segment may begin or end with one."""
    tokens: list[int] = [] if adjacent and draw(st.booleans()) else draw(text)
    images, videos = [], []
    for kind in draw(st.lists(st.sampled_from(["image", "video", "text"]), max_size=4)):
        if kind == "text":
            tokens += draw(text)
        elif kind == "image":
            images.append([draw(st.integers(1, 3)), draw(side), draw(side)])
            tokens += (
                [START, *placeholders(IMAGE, images[-1]), END] if not adjacent else placeholders(IMAGE, images[-1])
            )
        else:
            videos.append([draw(st.integers(1, 3)), draw(side), draw(side)])
            for _ in range(videos[-1][0]):
                tokens += [*draw(text), START, *placeholders(VIDEO, [1, *videos[-1][1:]])]
                tokens += [] if adjacent else [END]
    return Segment(tokens or draw(text), images, videos)


def packs(adjacent: bool) -> st.SearchStrategy[Pack]:
    return st.builds(Pack, st.lists(segments(adjacent), min_size=1, max_size=4), st.integers(0, 5))


def count_token_by_token(pack: Pack) -> Tensor:
    """The slow, obvious version: walk over the tokens, place by place in each grid."""
    out: list[list[int]] = []
    for segment in [*pack.segments, Segment([PAD] * pack.padding, [], [])]:
        images = iter(segment.images)
        frames = iter([[1, h, w] for t, h, w in segment.videos for _ in range(t)])
        here, index = 0, 0
        while index < len(segment.tokens):
            token = segment.tokens[index]
            if token not in (IMAGE, VIDEO):
                out.append([here, here, here])
                here, index = here + 1, index + 1
                continue
            grid_t, grid_h, grid_w = next(images if token == IMAGE else frames)
            for t in range(grid_t):
                for h in range(grid_h // MERGE):
                    for w in range(grid_w // MERGE):
                        assert segment.tokens[index] == token
                        out.append([here + t, here + h, here + w])
                        index += 1
            here += max(grid_h, grid_w) // MERGE
    return torch.tensor(out, dtype=torch.int64).reshape(-1, 3).T


@settings(max_examples=300, deadline=None)
@given(packs(adjacent=False) | packs(adjacent=True))
def test_positions_equal_a_count_token_by_token(pack: Pack) -> None:
    positions = pack.positions()
    assert positions.dtype == torch.int64
    assert torch.equal(positions, count_token_by_token(pack))


@pytest.fixture(scope="module")
def reference() -> Qwen3VLModel:
    text_config = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 16,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "patch_size": 4,
        "spatial_merge_size": MERGE,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text_config, vision_config=vision))


@settings(max_examples=150, deadline=None)
@given(pack=packs(adjacent=False))
def test_positions_equal_transformers_segment_by_segment(reference: Qwen3VLModel, pack: Pack) -> None:
    expected = []
    for segment in pack.segments:
        ids = torch.tensor([segment.tokens])
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        images, videos = (torch.tensor(g) if g else None for g in (segment.images, segment.videos))
        expected.append(reference.get_rope_index(ids, kinds, images, videos)[0][:, 0])
    filled = sum(pack.lengths)
    assert torch.equal(pack.positions()[:, :filled], torch.cat(expected, dim=1))


@given(packs(adjacent=True))
def test_true_counts_per_segment_are_accepted_and_change_nothing(pack: Pack) -> None:
    images, videos = [len(s.images) for s in pack.segments], [len(s.videos) for s in pack.segments]
    assert torch.equal(pack.positions(images_per_segment=images, videos_per_segment=videos), pack.positions())


def test_an_image_of_two_frames_counts_its_frames_in_time() -> None:
    positions = positions_of([5, *[IMAGE] * 4, 5], [6], [[2, 2, 4]])
    assert positions.tolist() == [[0, 1, 1, 2, 2, 3], [0, 1, 1, 1, 1, 3], [0, 1, 2, 1, 2, 3]]


def test_an_image_of_two_frames_of_several_rows_equals_transformers(reference: Qwen3VLModel) -> None:
    grid = [2, 6, 4]
    tokens = [5, *placeholders(IMAGE, grid), 5]
    positions = positions_of(tokens, [len(tokens)], [grid])
    time, rows, columns = positions[:, 1:-1].reshape(3, 2, 3, 2) - 1
    assert time.tolist() == [[[0, 0]] * 3, [[1, 1]] * 3]
    assert rows.tolist() == [[[0, 0], [1, 1], [2, 2]]] * 2
    assert columns.tolist() == [[[0, 1]] * 3] * 2
    assert positions[:, -1].tolist() == [1 + 3] * 3  # the longer side, not the frames
    kinds = torch.tensor([[int(token == IMAGE) for token in tokens]])
    expected = reference.get_rope_index(torch.tensor([tokens]), kinds, torch.tensor([grid]))[0][:, 0]
    assert torch.equal(positions, expected)


def test_padding_counts_from_zero_and_a_pack_may_be_all_padding() -> None:
    assert positions_of([5, 5, 0, 0, 0], [2], []).tolist() == [[0, 1, 0, 1, 2]] * 3
    assert positions_of([0, 0], [], []).tolist() == [[0, 1]] * 3


UNFIT = {
    "zero side": ([5, IMAGE], [2], [[1, 0, 2]], r"image 0: grid \(1, 0, 2\).*h .*found 0"),
    "negative side": ([5, IMAGE], [2], [[1, 2, -2]], r"image 0: grid \(1, 2, -2\).*w .*found -2"),
    "zero time": ([5, IMAGE], [2], [[0, 2, 2]], r"image 0: grid \(0, 2, 2\).*t .*found 0"),
    "odd side": ([5, IMAGE], [2], [[1, 2, 3]], r"image 0: grid \(1, 2, 3\).*divisible by the merge size 2, found 3"),
    "float grid": ([5, IMAGE], [2], [[1.0, 2.0, 2.0]], r"image_grid_thw: expected int64 \[n, 3\]"),
    "flat grid": ([5, IMAGE], [2], [1, 2, 2], r"image_grid_thw: expected int64 \[n, 3\], found torch.int64 \[3\]"),
    "no grid": ([5, 5, IMAGE], [1, 2], [], r"segment 1: found 1 image placeholder tokens.*make 0 tokens"),
    "too few tokens": ([5, IMAGE, 5], [3], [[1, 2, 4]], r"segment 0: found 1 .*image 0 with grid \(1, 2, 4\) needs 2"),
    "too many tokens": ([5, IMAGE, IMAGE], [3], [[1, 2, 2]], r"segment 0: found 2 .*make 1 tokens"),
    "grid left over": (
        [5, IMAGE],
        [2],
        [[1, 2, 2], [1, 2, 4]],
        r"image 1 with grid .*has no placeholders.*1 image placeholder.*2 grids that make 3",
    ),
    "cut by the end": ([IMAGE, IMAGE, 5], [1, 2], [[1, 2, 4]], r"segment 0: .*image 0 .*needs 2 tokens, but only 1"),
    "broken": ([IMAGE, 5, IMAGE], [3], [[1, 2, 4]], r"segment 0: image 0 .*needs 2 .*in a row from token 0, found 1"),
    "in the padding": ([5, 0, IMAGE], [1], [[1, 2, 2]], r"padding: 1 image placeholder tokens.*at token 2"),
    "long segments": ([5, 5], [1, 2], [], r"2 segments sum to 3 tokens, but the pack has 2"),
    "empty segment": ([5, 5], [2, 0], [], r"segment 1: expected a positive length, found 0"),
    "batch axis": ([[5, 5]], [2], [], r"expected a pack \[T\], found \[1, 2\]"),
}


@pytest.mark.parametrize(("tokens", "lengths", "images", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_invalid_input_is_rejected_with_its_values(
    tokens: list[int], lengths: list[int], images: list, message: str
) -> None:
    with pytest.raises(VLBridgeError, match=message):
        positions_of(tokens, lengths, images)


def test_a_video_cut_between_its_frames_is_rejected() -> None:
    with pytest.raises(
        VLBridgeError, match=r"segment 0: found 1 video .*video 0 with grid \(2, 2, 2\) needs 2 .*only 1"
    ):
        positions_of([5, VIDEO, 5, VIDEO], [2, 2], [], [[2, 2, 2]])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 0], r"segment 0: found 1 image placeholder tokens; its 2 images \(from image 0, .*make 3"),
        ([1, 0], r"images_per_segment: expected 2 counts >= 0 that sum to 2 grids, found \[1, 0\]"),
        ([3, -1], r"images_per_segment: .*found \[3, -1\]"),
        ([2], r"images_per_segment: expected 2 counts"),
    ],
)
def test_wrong_counts_per_segment_are_rejected(counts: list[int], message: str) -> None:
    with pytest.raises(VLBridgeError, match=message):
        mrope_positions(
            torch.tensor([5, IMAGE, 5, IMAGE, IMAGE]),
            [2, 3],
            torch.tensor([[1, 2, 2], [1, 2, 4]]),
            NO_GRID,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            merge_size=MERGE,
            images_per_segment=counts,
        )
