"""Random packs with images, and a walk over their tokens that says what every rank must hold."""

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.model.inputs import Media

IMAGE, VIDEO, FILLER, WORDS = 10, 11, 0, range(20, 120)
Grid = tuple[int, int, int]
_REAL = read_config(Path(__file__).parents[1] / "data" / "configs" / "Qwen3-VL-2B-Instruct.json")
CONFIG = replace(
    _REAL,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    text=replace(_REAL.text, vocab_size=128),
    vision=replace(_REAL.vision, patch_size=1, temporal_patch_size=1),
)
_PATCHES = torch.zeros(1 << 14, CONFIG.vision.patch_dim)


@dataclass
class Token:
    """A token of a padded pack; `feature`: its row of the tower's output; `position`: time, row, column.

    `next_id` and `next_label`: those of the next token of its conversation, if there is one. `place`: in its `segment`.
    """

    id: int
    label: int = -100
    feature: int | None = None
    position: tuple[int, int, int] = (0, 0, 0)
    padding: bool = False
    next_id: int = FILLER
    next_label: int = -100
    segment: int = 0
    place: int = 0


@dataclass
class Segment:
    """One conversation, its images in order, and its length with padding."""

    ids: list[int]
    labels: list[int]
    images: list[Grid]
    videos: list[Grid]
    padded: int = 0


@dataclass
class Batch:
    """A pack for `cp` context-parallel ranks; each cuts its row in `tp` parts (1: no sequence parallelism)."""

    segments: list[Segment]
    cp: int
    tp: int

    def media(self) -> Media:
        """All images of the pack; their pixels do not matter."""
        parts = []
        for kind in ("images", "videos"):
            grids = [grid for segment in self.segments for grid in getattr(segment, kind)]
            count = sum(t * h * w for t, h, w in grids)
            parts += [_PATCHES[:count], torch.tensor(grids, dtype=torch.int64).view(-1, 3)]
        counts = [torch.tensor([len(getattr(s, kind)) for s in self.segments]) for kind in ("images", "videos")]
        return Media(*parts, *counts)

    @property
    def cu_seqlens(self) -> list[int]:
        """Where the padded segments begin and end."""
        bounds = [0]
        for segment in self.segments:
            bounds.append(bounds[-1] + segment.padded)
        return bounds

    @property
    def lengths(self) -> list[int]:
        """Lengths without padding."""
        return [len(segment.ids) for segment in self.segments]


def random_batch(seed: int) -> Batch:
    """Segments of text, images and videos in any order, padded for a random layout."""
    rng = random.Random(seed)
    cp, tp = rng.choice([1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 8]), rng.choice([1, 1, 2, 4])
    segments = [_segment(rng) for _ in range(rng.randint(1, 4))]
    for segment in segments:
        # A framework may pad more than it must.
        step = 2 * cp if cp > 1 else 1
        segment.padded = -(-len(segment.ids) // step) * step + rng.choice([0, 0, step])
    while sum(segment.padded for segment in segments) % (cp * tp):
        segments[-1].padded += 2 * cp if cp > 1 else 1
    return Batch(segments, cp, tp)


def _segment(rng: random.Random) -> Segment:
    def words(least: int) -> list[int]:
        return rng.choices(WORDS, k=rng.randint(least, 6))

    ids, images, videos = words(0), [], []
    for kind in rng.choices(["text", "image", "video"], k=rng.randint(0, 4)):
        grid = (rng.choice([1, 1, 1, 2, 3]), 2 * rng.randint(1, 4), 2 * rng.randint(1, 4))
        if kind == "text":
            ids += words(1)
        elif kind == "image":
            images.append(grid if rng.random() < 0.1 else (1, *grid[1:]))
            ids += [IMAGE] * (images[-1][0] * grid[1] * grid[2] // 4) + words(0)
        else:
            videos.append(grid)
            for _ in range(grid[0]):
                ids += [VIDEO] * (grid[1] * grid[2] // 4) + words(0)
    ids = ids or words(1)
    return Segment(
        ids, [i if i in WORDS and rng.random() < 0.5 else -100 for i in rng.choices(WORDS, k=len(ids))], images, videos
    )


def walk(batch: Batch) -> list[list[Token]]:
    """The padded segments token by token: rows of the tower, and positions counted place by place in each grid."""
    images = [place for s in batch.segments for grid in s.images for place in _places(grid, split=False)]
    videos = [place for s in batch.segments for grid in s.videos for place in _places(grid, split=True)]
    taken = {IMAGE: 0, VIDEO: 0}
    result = []
    for segment in batch.segments:
        row, here = [], 0
        for id_, label in zip(segment.ids, segment.labels, strict=True):
            token = Token(id_, label)
            if id_ in taken:
                (frame, line, column), advance, last = (images if id_ == IMAGE else videos)[taken[id_]]
                token.feature = taken[id_] + (len(images) if id_ == VIDEO else 0)
                token.position = (here + frame, here + line, here + column)
                taken[id_] += 1
                here += advance if last else 0
            else:
                token.position = (here, here, here)
                here += 1
            row.append(token)
        for token, after in pairwise(row):
            token.next_id, token.next_label = after.id, after.label
        for _ in range(segment.padded - len(segment.ids)):
            row.append(Token(FILLER, position=(here, here, here), padding=True))
            here += 1
        for place, token in enumerate(row):
            token.segment, token.place = len(result), place
        result.append(row)
    return result


def _places(grid: Grid, split: bool) -> list[tuple[tuple[int, int, int], int, bool]]:
    """Of each token of an image: frame, row, column; how far its block moves the position; is it the block's last."""
    frames, rows, columns = grid[0], grid[1] // 2, grid[2] // 2
    block = [
        ((frame, row, column), max(rows, columns), (frame, row, column) == (frames - 1, rows - 1, columns - 1))
        for frame in range(frames)
        for row in range(rows)
        for column in range(columns)
    ]
    return _places((1, *grid[1:]), split=False) * frames if split else block


def cut(segments: list[list[Token]], cp: int, rank: int) -> list[Token]:
    """A rank's part, chunk by chunk; one rank alone holds the segments as they are, of any length."""
    if cp == 1:
        return [token for segment in segments for token in segment]
    mine = []
    for segment in segments:
        size = len(segment) // (2 * cp)
        for chunk in range(2 * cp):
            if chunk in (rank, 2 * cp - 1 - rank):
                mine += segment[chunk * size : (chunk + 1) * size]
    return mine


def rows_of(tokens: list[Token], padding: int = FILLER) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (of padding: `padding`) and labels `[1, T]` as a framework would hand them over."""
    ids = [padding if t.padding else t.id for t in tokens]
    return torch.tensor([ids]), torch.tensor([[t.label for t in tokens]])
