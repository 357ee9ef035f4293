"""MRoPE position ids of a 32k-token pack with images and videos, compared with transformers' `get_rope_index`.

    python benchmarks/positions.py

Both get the same tokens and grids. transformers is called once per segment, as its function does not support packs, and
its token types are computed outside the measurement; our function also validates its input. Both run on one thread, as
in a data loader worker. Prints the medians and their ratio; exit code 1 if the position ids differ or the ratio is
below 20.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel

from megatron_vlbridge.layout.positions import mrope_positions

CAPACITY = 32_768
IMAGE, VIDEO, MERGE = 10, 11, 2
REQUIRED_RATIO = 20.0
ROUNDS = 15


@dataclass
class Segment:
    """One conversation: tokens `[L]` and grids `[n, 3]`."""

    tokens: Tensor
    images: Tensor
    videos: Tensor


def make_segment(generator: torch.Generator) -> Segment:
    """Text, two or three images of about 200 to 400 tokens, and a video of 8 to 16 frames of about 60 tokens."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def text(low: int, high: int) -> Tensor:
        return torch.randint(12, 128, (draw(low, high),), generator=generator)

    images = torch.tensor([[1, 2 * draw(14, 20), 2 * draw(14, 20)] for _ in range(draw(2, 3))])
    videos = torch.tensor([[draw(8, 16), 2 * draw(6, 9), 2 * draw(6, 9)]])
    parts = [text(20, 60)]
    for _, h, w in images.tolist():
        parts += [torch.full((h * w // MERGE**2,), IMAGE), text(20, 200)]
    for t, h, w in videos.tolist():
        for _ in range(t):
            parts += [torch.full((h * w // MERGE**2,), VIDEO), text(8, 8)]
    return Segment(torch.cat([*parts, text(50, 200)]), images, videos)


def make_pack(seed: int = 0) -> list[Segment]:
    """Segments until the next one would exceed the capacity."""
    generator = torch.Generator().manual_seed(seed)
    segments: list[Segment] = []
    while True:
        segment = make_segment(generator)
        if sum(len(s.tokens) for s in segments) + len(segment.tokens) > CAPACITY:
            return segments
        segments.append(segment)


def reference_model() -> Qwen3VLModel:
    """A tiny model: `get_rope_index` is a method, but reads only the merge size."""
    text = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
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
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def median_ms(call: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def main() -> int:
    torch.set_num_threads(1)
    segments = make_pack()
    filled = sum(len(s.tokens) for s in segments)
    tokens = torch.cat([*(s.tokens for s in segments), torch.zeros(CAPACITY - filled, dtype=torch.int64)])
    lengths = [len(s.tokens) for s in segments]
    images, videos = torch.cat([s.images for s in segments]), torch.cat([s.videos for s in segments])
    types = [((s.tokens == IMAGE).int() + 2 * (s.tokens == VIDEO).int())[None] for s in segments]
    model = reference_model()

    def ours() -> Tensor:
        return mrope_positions(
            tokens, lengths, images, videos, image_token_id=IMAGE, video_token_id=VIDEO, merge_size=MERGE
        )

    def reference() -> Tensor:
        calls = (
            model.get_rope_index(s.tokens[None], m, s.images, s.videos) for s, m in zip(segments, types, strict=True)
        )
        return torch.cat([positions[:, 0] for positions, _ in calls], dim=1)

    equal = torch.equal(ours()[:, :filled], reference())
    ours_ms, reference_ms = median_ms(ours), median_ms(reference)
    ratio = reference_ms / ours_ms
    print(f"{CAPACITY} tokens, {len(segments)} segments, {len(images)} images, {len(videos)} videos", end=" ")
    print(f"with {int(videos[:, 0].sum())} frames; median of {ROUNDS}, one thread")
    print(f"transformers {reference_ms:.2f} ms   ours {ours_ms:.3f} ms   ratio {ratio:.1f}", end=" ")
    print(f"(required {REQUIRED_RATIO:.0f})   equal: {equal}")
    return 0 if equal and ratio >= REQUIRED_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
