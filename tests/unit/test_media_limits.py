"""Each image and video is resized to its own limits, as by transformers called with its `size` for it alone."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.media import image_size, load_video, media_grid
from megatron_vlbridge.data.processors.item_sizes import with_sizes
from megatron_vlbridge.demo.tiny_processor import build_processor
from megatron_vlbridge.training.launch.media import add_media_arguments, media_options
from tests.errors import rejects
from tests.video_writer import moving, write_video

# The processor's own limits.
LEAST, MOST = 64 * 2, 64 * 24
WIDE = 16 * MOST


@pytest.fixture(scope="module")
def qwen3() -> Qwen3VLProcessor:
    return build_processor(["hello", "seven"], patch_size=4, merge_size=2, min_pixels=LEAST, max_pixels=MOST)


def talk(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": "seven"}]


def image(width: int, height: int, **limits: int) -> dict[str, Any]:
    return {"type": "image", "image": Image.fromarray(moving(1, width, height)[0]), **limits}


def video(count: int, width: int, height: int, **limits: Any) -> dict[str, Any]:
    frames = torch.from_numpy(moving(count, width, height)).permute(0, 3, 1, 2).contiguous()
    return {"type": "video", "video": frames, "fps": 2, **limits}


def edges(shortest: int, longest: int) -> dict[str, int]:
    return {"shortest_edge": shortest, "longest_edge": longest}


def reference(processor: Qwen3VLProcessor, part: dict[str, Any], size: dict[str, int]) -> Any:
    """Text, patches and grid that transformers gives this image or video alone."""
    if part["type"] == "image":
        text, media = "<|vision_start|><|image_pad|><|vision_end|>", {"images": [part["image"]]}
        settings: dict[str, Any] = {"images_kwargs": {"size": size}}
    else:
        frames = part["video"]
        metadata = VideoMetadata(total_num_frames=len(frames), fps=part["fps"], frames_indices=list(range(len(frames))))
        text, media = "<|video_pad|>", {"videos": [frames]}
        settings = {"videos_kwargs": {"size": size, "video_metadata": [metadata], "do_sample_frames": False}}
    return processor(text=[text], return_tensors="pt", **media, **settings)


def same(sample: Sample, processor: Qwen3VLProcessor, parts: list[dict[str, Any]], sizes: list[dict[str, int]]) -> None:
    """The sample is made of the parts as transformers encodes each with its size, in one user turn."""
    encoded = [reference(processor, part, size) for part, size in zip(parts, sizes, strict=True)]
    tokenizer = processor.tokenizer
    around = tokenizer("<|im_start|>user\n"), tokenizer("<|im_end|>\n<|im_start|>assistant\nseven<|im_end|>\n")
    content = [token for part in encoded for token in part["input_ids"][0].tolist()]
    assert sample.input_ids.tolist() == [*around[0]["input_ids"], *content, *around[1]["input_ids"]]
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        expected = [part[name] for part in encoded if name in part]
        found = getattr(sample, name)
        assert torch.equal(found, torch.cat(expected)) if expected else len(found) == 0


IMAGES: list[tuple[dict[str, int], dict[str, int]]] = [
    ({}, edges(LEAST, MOST)),
    ({"max_pixels": 256}, edges(LEAST, 256)),
    ({"min_pixels": 1000}, edges(1000, MOST)),
    ({"min_pixels": 3000, "max_pixels": 4000}, edges(3000, 4000)),
    ({"max_pixels": LEAST}, edges(LEAST, LEAST)),
]
VIDEOS: list[tuple[dict[str, int], dict[str, int]]] = [
    ({}, edges(LEAST, WIDE)),
    ({"max_pixels": 2000}, edges(LEAST, 2000)),
    ({"min_pixels": WIDE // 2}, edges(WIDE // 2, WIDE)),
    ({"total_pixels": 1500}, edges(LEAST, 3000)),
    ({"total_pixels": 10**6}, edges(LEAST, WIDE)),
    ({"total_pixels": 1500, "max_pixels": 2500}, edges(LEAST, 2500)),
]


def test_each_image_and_video_has_its_own_limits(qwen3: Qwen3VLProcessor) -> None:
    parts, sizes = [], []
    for index, ((image_keys, image_edges), (video_keys, video_edges)) in enumerate(
        zip([*IMAGES, IMAGES[1]], VIDEOS, strict=True)
    ):
        parts += [image(40, 24 + 8 * index, **image_keys), video(3 + index % 3, 40, 32, **video_keys)]
        sizes += [image_edges, video_edges]
    # Twice, so that equal shapes with different limits occur.
    parts, sizes = [*parts, image(40, 24), video(3, 40, 32)], [*sizes, IMAGES[0][1], VIDEOS[0][1]]
    for part, size in zip(parts, sizes, strict=True):
        if part["type"] == "video":
            own = load_video(part, video_processor=qwen3.video_processor).size
            assert own == (size if "total_pixels" in part or "max_pixels" in part or "min_pixels" in part else None)
    sample = encode_conversation(talk(parts), qwen3)
    same(sample, qwen3, parts, sizes)
    grids = [*sample.image_grid_thw.tolist(), *sample.video_grid_thw.tolist()]
    assert len(set(map(tuple, grids))) > 8
    ordered = [part for kind in ("image", "video") for part in parts if part["type"] == kind]
    assert [list(media_grid(part, qwen3)) for part in ordered] == grids


@pytest.mark.parametrize("kind", ["image", "video"])
def test_options_are_for_what_has_no_limits_of_its_own(kind: str, qwen3: Qwen3VLProcessor) -> None:
    prefix, make, most = ("", image, MOST) if kind == "image" else ("video_", video, WIDE)
    size = (40, 40) if kind == "image" else (4, 40, 40)
    options = MediaOptions(**{f"{prefix}min_pixels": 300, f"{prefix}max_pixels": 700})
    other = video(4, 40, 40) if kind == "image" else image(40, 40)
    other_edges = edges(LEAST, WIDE if kind == "image" else MOST)
    parts = [make(*size), make(*size, max_pixels=600), make(*size, min_pixels=200, max_pixels=most), other]
    sample = encode_conversation(talk(parts), qwen3, media=options)
    same(sample, qwen3, parts, [edges(300, 700), edges(300, 600), edges(200, most), other_edges])
    grids = sample.image_grid_thw if kind == "image" else sample.video_grid_thw
    assert [list(media_grid(part, qwen3, options)) for part in parts[:3]] == grids.tolist()


def test_without_limits_the_processor_is_called_as_it_is(qwen3: Qwen3VLProcessor) -> None:
    assert with_sizes(qwen3, [None, None], []) is qwen3
    own = qwen3.image_processor
    assert with_sizes(qwen3, [edges(64, 64)], []).image_processor is not own
    assert qwen3.image_processor is own


def test_limits_of_each_frame_are_those_of_transformers() -> None:
    """Qwen2.5-VL, whose limits are for each frame; `total_pixels` is shared as in qwen-vl-utils."""
    processor = Qwen2VLVideoProcessor(
        patch_size=4, merge_size=2, size=edges(LEAST, MOST), do_sample_frames=False, cap_pixels_per_frame=False
    )
    for count in (2, 5, 8):
        for keys, longest in (
            ({}, MOST),
            ({"max_pixels": 300}, 300),
            ({"total_pixels": 1200}, max(min(MOST, int(1200 / count * 2)), int(LEAST * 1.05))),
            ({"total_pixels": 1200, "max_pixels": 400}, max(min(400, int(1200 / count * 2)), int(LEAST * 1.05))),
            ({"total_pixels": 10}, int(LEAST * 1.05)),
        ):
            part = video(count, 40, 32, **keys)
            loaded = load_video(part, video_processor=processor)
            size = loaded.size or edges(LEAST, MOST)
            assert size == edges(LEAST, longest)
            expected = processor([part["video"]], size=edges(LEAST, longest), return_tensors="pt")["video_grid_thw"]
            shim: Any = argparse.Namespace(video_processor=processor)
            assert list(media_grid(part, shim)) == expected[0].tolist()


INVALID: list[tuple[dict[str, Any], str]] = [
    *(({"max_pixels": value}, "a positive integer under 'max_pixels'") for value in (0, -1, 2.0, "9", True, None)),
    ({"min_pixels": math.inf}, "a positive integer under 'min_pixels'"),
    ({"max_pixels": LEAST - 1}, f"at least min_pixels, found {LEAST - 1} and {LEAST}"),
    ({"min_pixels": 20, "max_pixels": 10}, "at least min_pixels, found 10 and 20"),
]


@pytest.mark.parametrize("make", [image, video])
@pytest.mark.parametrize(("keys", "problem"), INVALID, ids=str)
def test_invalid_limits_are_rejected(make: Any, keys: dict[str, Any], problem: str, qwen3: Qwen3VLProcessor) -> None:
    part = make(*((40, 40) if make is image else (4, 40, 40)), **keys)
    with rejects("message 0 (user), part 1: ", problem):
        encode_conversation(talk([{"type": "text", "text": "hello"}, part]), qwen3)
    with rejects(problem, start=f"{part['type']}: "):
        media_grid(part, qwen3)


def test_a_total_below_the_least_pixels_is_rejected(qwen3: Qwen3VLProcessor) -> None:
    assert load_video(video(4, 40, 40, total_pixels=LEAST // 2), video_processor=qwen3.video_processor).size
    with rejects(f"at least min_pixels, found {LEAST - 2} and {LEAST}"):
        load_video(video(4, 40, 40, total_pixels=LEAST // 2 - 1), video_processor=qwen3.video_processor)


def test_without_a_processor_only_frames_without_limits_are_loaded(tmp_path: Path) -> None:
    assert load_video(video(4, 40, 40)).size is None
    file = {"type": "video", "video": str(write_video(tmp_path / "a.mp4", moving(4)))}
    for part in (file, video(4, 40, 40, max_pixels=2000)):
        with rejects("a file and limits need the processor: load_video(part, options, video_processor)"):
            load_video(part)


def test_limits_of_an_unknown_processor_are_rejected() -> None:
    unknown: Any = type("OtherImageProcessor", (), {})()
    assert image_size({"image": "a.png"}, unknown) is None
    with rejects("processor: expected one of", "found OtherImageProcessor"):
        image_size({"image": "a.png", "max_pixels": 9}, unknown)


def test_the_arguments_are_the_options() -> None:
    parser = argparse.ArgumentParser()
    add_media_arguments(parser)
    assert media_options(parser.parse_args([])) == MediaOptions()
    given = {"max_image_pixels": 99, "min_pixels": 1, "max_pixels": 2, "video_min_pixels": 3, "video_max_pixels": 4}
    given |= {"video_total_pixels": 5, "video_min_frames": 7, "video_max_frames": 8}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    options = media_options(parser.parse_args([*words, "--video-fps", "0.5"]))
    assert options == MediaOptions(**given, video_fps=0.5)


def test_contradicting_options_are_rejected() -> None:
    for name in ("min_pixels", "video_total_pixels", "video_fps", "video_max_frames"):
        for value in (0, -1, math.inf, math.nan):
            with rejects(f"{name}: expected a positive number, found {value}"):
                MediaOptions(**{name: value})
    for low, high in (
        ("min_pixels", "max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
        ("video_min_frames", "video_max_frames"),
    ):
        assert MediaOptions(**{low: 5, high: 5})
        with rejects(f"{low}: expected at most {high} 4, found 5"):
            MediaOptions(**{low: 5, high: 4})


def test_an_image_processor_that_is_called_for_each_item_gives_the_same(tmp_path: Path) -> None:
    """One call for images of one shape, and one for each, have the same patches."""
    processor = Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=edges(64, 2000))
    images = [Image.fromarray(np.roll(moving(1, 40, 24)[0], shift, 0)) for shift in range(3)]
    together = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(together, torch.cat([processor([one], return_tensors="pt")["pixel_values"] for one in images]))
