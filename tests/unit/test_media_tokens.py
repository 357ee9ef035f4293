"""Grids and token counts computed from sizes are those of the processors of transformers."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoVideoProcessor, Qwen2VLImageProcessor, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.media import media_grid
from megatron_vlbridge.data.media_tokens import (
    ImageSettings,
    VideoSettings,
    frame_indices,
    grid_tokens,
    image_grid,
    image_settings,
    video_grid,
    video_settings,
)
from megatron_vlbridge.data.video_prompt import timestamps
from megatron_vlbridge.demo.tiny_processor import build_processor
from megatron_vlbridge.errors import VLBridgeError
from tests.errors import rejects
from tests.video_writer import decoded, moving, write_video

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
# A factor of 8 pixels, and limits that bind for images of up to 100 pixels a side.
PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
# Limits as published: 28 and 32 pixels a side, up to 16,384 tokens.
PUBLISHED = {
    "qwen2_5_vl": {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 12_845_056}},
    "qwen3_vl": {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},
}
RATES = (1, 5, 23.976, 25, 29.97, 30, 60)
# What transformers raises: for too few frames and an aspect ratio, for no frame, for a frame after the last one.
REJECTED = (VLBridgeError, ValueError, ZeroDivisionError, IndexError)
VIDEO_DEFAULTS = {"fps": 2, "do_sample_frames": True, "cap_pixels_per_frame": False}


def auto(auto_class: Any, family: str, folder: Path, **settings: Any) -> Any:
    """The processor that transformers finds for a model type."""
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    return auto_class.from_pretrained(folder)


def limits(random: random.Random, low: int, high: int) -> dict[str, int]:
    smallest = random.randint(low, high // 4)
    return {"shortest_edge": smallest, "longest_edge": random.randint(2 * smallest, high)}


def result[**P, T](call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | None:
    """None where the call rejects its arguments."""
    try:
        return call(*arguments, **named)
    except REJECTED:
        return None


# ---- images ---------------------------------------------------------------------------------------------------------


def images(count: int) -> Iterator[tuple[int, int, dict[str, int]]]:
    """Sizes and the limits of each image; some are rejected for their aspect ratio."""
    generator = random.Random(0)
    for index in range(count):
        width, height = generator.randint(1, 100), generator.randint(1, 100)
        if index % 20 == 0:
            width, height = generator.choice([(generator.randint(195, 220), 1), (1, generator.randint(195, 220))])
        yield width, height, limits(generator, 1, 6000)


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.layouts)])
@pytest.mark.parametrize("family", FAMILIES)
def test_grids_of_images_are_those_of_the_processor(family: str, count: int, tmp_path: Path) -> None:
    processor = auto(AutoImageProcessor, family, tmp_path, **PATCHES)
    rejected = above = below = 0
    for width, height, size in images(count):
        settings = dataclasses.replace(
            image_settings(processor), min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
        )
        image = Image.new("RGB", (width, height))
        expected = result(processor, [image], size=size, return_tensors="pt")
        found = result(image_grid, width, height, settings)
        if expected is None:
            assert found is None
            rejected += 1
            continue
        assert found is not None
        assert list(found) == expected["image_grid_thw"][0].tolist()
        assert 4 * grid_tokens(found, 2) == len(expected["pixel_values"])
        plain = 64 * round(width / 8) * round(height / 8)
        above, below = above + (plain > settings.max_pixels), below + (plain < settings.min_pixels)
    assert min(above, below) > count // 10
    assert rejected > count // 60


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_images_have_the_patches_of_published_processors(name: str) -> None:
    processor, generator = Qwen2VLImageProcessor(**PUBLISHED[name]), random.Random(0)
    settings = image_settings(processor)
    for _ in range(2000):
        width, height = generator.randint(1, 6000), generator.randint(1, 6000)
        expected = result(processor.get_number_of_image_patches, height, width)
        grid = result(image_grid, width, height, settings)
        assert expected == (4 * grid_tokens(grid, 2) if grid else None)


def test_invalid_images_are_rejected_with_their_size() -> None:
    settings = ImageSettings(16, 2, 65_536, 16_777_216)
    assert image_grid(640, 480, settings) == (1, 30, 40)
    assert image_grid(200, 1, settings)[0] == image_grid(1, 200, settings)[0] == 1
    with rejects("image: expected an aspect ratio of at most 200, found 201 x 1"):
        image_grid(201, 1, settings)
    for size in ((0, 5), (5, 0)):
        with rejects("image: expected sides of at least 1 pixel", f"{size[0]} x {size[1]}"):
            image_grid(*size, settings)
    for name in ("patch_size", "merge_size", "min_pixels", "max_pixels"):
        with rejects(f"{name}: expected a positive number, found 0"):
            dataclasses.replace(settings, **{name: 0})


def some_limits(random: random.Random, low: int, high: int) -> dict[str, int]:
    """None, one or both of the limits of an image or video."""
    smallest = random.randint(low, high // 4)
    given = {"min_pixels": smallest, "max_pixels": random.randint(2 * smallest, high)}
    return {name: value for name, value in given.items() if random.random() < 0.6}


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.layouts)])
@pytest.mark.parametrize("family", FAMILIES)
def test_grids_of_images_with_their_own_limits_are_those_of_the_processor(
    family: str, count: int, tmp_path: Path
) -> None:
    size = {"shortest_edge": 900, "longest_edge": 3000}
    processor, generator = auto(AutoImageProcessor, family, tmp_path, **PATCHES, size=size), random.Random(1)
    shim: Any = SimpleNamespace(image_processor=processor)
    rejected = changed = 0
    for width, height, _ in images(count):
        given = some_limits(generator, 1, 6000)
        own = {"shortest_edge": given.get("min_pixels", 900), "longest_edge": given.get("max_pixels", 3000)}
        image = Image.new("RGB", (width, height))
        expected = result(processor, [image], size=own, return_tensors="pt")
        found = result(media_grid, {"type": "image", "image": image, **given}, shim)
        if own["shortest_edge"] > own["longest_edge"] or expected is None:
            assert found is None
            rejected += 1
            continue
        assert found is not None
        assert list(found) == expected["image_grid_thw"][0].tolist()
        changed += found != image_grid(width, height, image_settings(processor))
    assert changed > count // 10
    assert count // 60 < rejected < count // 2


# ---- videos ---------------------------------------------------------------------------------------------------------


def clip(num_frames: int, fps: float | None, width: int = 8, height: int = 8) -> dict[str, Any]:
    """The arguments of a video processor; the pixels of each frame are its index."""
    frames = torch.arange(num_frames, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, height, width)
    seconds = num_frames / fps if fps else None
    metadata = VideoMetadata(total_num_frames=num_frames, fps=fps, width=width, height=height, duration=seconds)
    return {"videos": [frames], "video_metadata": [metadata], "return_metadata": True, "return_tensors": "pt"}


def videos(count: int, whole_video: bool) -> Iterator[tuple[int, float, int, int, dict[str, Any]]]:
    """Frames, rate, size, and the settings of each video: limits, a rate, a cap, the least and most frames."""
    generator = random.Random(0)
    for index in range(count):
        num_frames = generator.randint(1, 3) if index % 10 == 0 else generator.randint(4, 48)
        width, height = generator.randint(1, 60), generator.randint(1, 60)
        if index % 20 == 1:
            width, height = generator.choice([(generator.randint(400, 1650), 2), (1, generator.randint(195, 210))])
        settings = {
            "size": limits(generator, 1, 24_000 if whole_video else 3000),
            "fps": generator.choice([0.5, 1, 2, 3, 7.5, 24]),
            "min_frames": generator.choice([1, 2, 4, 5]),
            "max_frames": generator.choice([2, 6, 7, 768]),
            "cap_pixels_per_frame": index % 2 == 0,
            "max_video_tokens": generator.choice([3, 9, 20] if whole_video else [40, 100, 200]),
        }
        yield num_frames, generator.choice(RATES), width, height, settings


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.layouts)])
@pytest.mark.parametrize("family", FAMILIES)
def test_grids_of_videos_are_those_of_the_processor(family: str, count: int, tmp_path: Path) -> None:
    whole_video = family != "qwen2_5_vl"
    rejected = capped = above = below = 0
    processor_class = type(auto(AutoVideoProcessor, family, tmp_path))
    for num_frames, fps, width, height, given in videos(count, whole_video):
        processor = processor_class(**PATCHES, **VIDEO_DEFAULTS | given)
        settings = video_settings(processor)
        assert settings.limits_whole_video == whole_video
        expected = result(processor, **clip(num_frames, fps, width, height))
        indices = result(frame_indices, num_frames, fps, settings)
        found = indices and result(video_grid, len(indices), width, height, settings)
        if expected is None:
            assert found is None
            rejected += 1
            continue
        assert indices == list(expected["video_metadata"][0].frames_indices)
        assert list(found) == expected["video_grid_thw"][0].tolist()
        assert 4 * grid_tokens(found, 2) == len(expected["pixel_values_videos"])
        free = dataclasses.replace(settings, cap_pixels_per_frame=False)
        boundless = dataclasses.replace(free, min_pixels=1, max_pixels=10**9)
        grids = [video_grid(len(indices), width, height, one) for one in (free, boundless)]
        capped, above = capped + (found != grids[0]), above + (grids[0] < grids[1])
        below += grids[0] > grids[1]
    assert rejected > count // 20
    assert min(capped, above, below) > count // 40


FILES = [(rate, codec, count) for rate in (5, 12, 30) for codec in ("mpeg4", "libx264") for count in (2, 7, 31)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, np.ndarray]]:
    """Video files of all sizes, with their frames."""
    folder, generator, made = tmp_path_factory.mktemp("videos"), random.Random(2), []
    for index, (rate, codec, count) in enumerate(FILES):
        width, height = (2 * generator.randint(8, 30) for _ in range(2))
        path = folder / f"{index}.{'mkv' if index % 3 == 0 else 'mp4'}"
        write_video(path, moving(count, width, height, index), rate, codec)
        made.append((path, decoded(path)))
    return made


def grid_with_options(part: dict[str, Any], processor: Any, options: dict[str, Any]) -> Any:
    return media_grid(part, processor, MediaOptions(**options))


@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.layouts)])
@pytest.mark.parametrize("family", FAMILIES)
def test_grids_of_video_files_are_those_of_the_processor(
    family: str, count: int, tmp_path: Path, files: list[tuple[Path, np.ndarray]]
) -> None:
    """Read from the header, with settings of the file, the options and the processor."""
    whole_video, generator = family != "qwen2_5_vl", random.Random(3)
    processor_class = type(auto(AutoVideoProcessor, family, tmp_path))
    rejected, found_grids, changed = 0, set(), 0
    for index in range(count):
        path, frames = files[index % len(files)]
        own = {"shortest_edge": 300, "longest_edge": 12_000 if whole_video else 1500}
        base = PATCHES | VIDEO_DEFAULTS | {"size": own, "cap_pixels_per_frame": index % 4 == 0}
        base |= {"max_video_tokens": generator.choice([3, 9, 20] if whole_video else [40, 100, 200])}
        choices = {"fps": [0.5, 1, 3, 7.5, 24], "min_frames": [1, 2, 4, 5], "max_frames": [2, 6, 7, 768]}
        sampling = {name: generator.choice(values) for name, values in choices.items() if generator.random() < 0.5}
        given = some_limits(generator, 100, 24_000 if whole_video else 3000)
        least, most = given.get("min_pixels", own["shortest_edge"]), given.get("max_pixels", own["longest_edge"])
        # The same of a processor that has these settings.
        expected, frame_limits = None, sampling.keys() >= {"min_frames", "max_frames"}
        if least <= most and not (frame_limits and sampling["min_frames"] > sampling["max_frames"]):
            same = processor_class(**base | sampling | {"size": {"shortest_edge": least, "longest_edge": most}})
            metadata = VideoMetadata(total_num_frames=len(frames), fps=float(FILES[index % len(files)][0]))
            expected = result(same, [frames], video_metadata=[metadata], return_tensors="pt")
        part = {"type": "video", "video": str(path)}
        shim: Any = SimpleNamespace(video_processor=processor_class(**base))
        options = {f"video_{name}": value for name, value in [*sampling.items(), *given.items()]}
        if index % 3:
            found = result(media_grid, {**part, **sampling, **given}, shim)
        else:
            found = result(grid_with_options, part, shim, options)
        if expected is None:
            assert found is None
            rejected += 1
            continue
        assert list(found) == expected["video_grid_thw"][0].tolist()
        found_grids.add(found)
        changed += found != media_grid(part, shim)
    assert rejected < count // 2
    assert len(found_grids) > count // 8
    assert changed > count // 4


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_of_sampling_are_those_of_the_processor(family: str, tmp_path: Path) -> None:
    processor = auto(AutoVideoProcessor, family, tmp_path, **PATCHES, **VIDEO_DEFAULTS)
    settings = video_settings(processor)
    ways = [{"fps": rate} for rate in (0.3, 1.5, 2, 4, 30)]
    ways += [{"fps": None, "num_frames": count} for count in (1, 2, 3, 5, 7, 12)]
    ways += [{"do_sample_frames": False}]
    taken: set[int] = set()
    for way in ways:
        changes = {"sample_frames" if name == "do_sample_frames" else name: value for name, value in way.items()}
        for name, value in way.items():
            setattr(processor, name, value)
        chosen = dataclasses.replace(settings, **changes)
        assert video_settings(processor) == chosen
        for num_frames in (2, 3, 5, 9, 17, 30, 61):
            # All but the frames themselves as above; with a rate of 1 and 14 frames of 17 a rounding error.
            expected = result(processor, **clip(num_frames, 7))
            found = result(frame_indices, num_frames, 7, chosen)
            if expected is None:
                assert found is None
            else:
                kept = expected["video_metadata"][0].frames_indices
                assert found == (list(range(num_frames)) if kept is None else list(kept))
                taken.add(len(found))
        for name in way:
            setattr(processor, name, VIDEO_DEFAULTS.get(name))
    assert len(taken) > 8


def test_a_processor_that_takes_a_frame_after_the_last_is_rejected(tmp_path: Path) -> None:
    processor = auto(AutoVideoProcessor, "qwen2_5_vl", tmp_path, **PATCHES, **VIDEO_DEFAULTS | {"fps": 14})
    with pytest.raises(IndexError):
        processor(**clip(17, 17))
    with rejects("expected frames 0 to 16", "takes 15", "the last one 17"):
        frame_indices(17, 17, video_settings(processor))


def test_the_tokens_of_a_video_with_timestamps_are_those_of_the_processor() -> None:
    processor: Qwen3VLProcessor = build_processor(["hello"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    settings, tokenizer = video_settings(processor.video_processor), processor.tokenizer
    for num_frames, fps in ((4, 1), (9, 2.5), (31, 29.97), (60, 4)):
        indices = frame_indices(num_frames, fps, settings)
        grid = video_grid(len(indices), 24, 16, settings)
        stamps = timestamps(indices, fps, settings.temporal_patch_size)
        assert len(stamps) == grid[0]
        frame = f"<|vision_start|>{'<|video_pad|>' * (grid_tokens(grid, 2) // grid[0])}<|vision_end|>"
        text = "".join(stamp + frame for stamp in stamps)
        expected = processor(text=["<|video_pad|>"], **clip(num_frames, fps, 24, 16))["input_ids"][0].tolist()
        assert tokenizer(text)["input_ids"] == expected


def settings_of(family: str, folder: Path, **given: Any) -> VideoSettings:
    return video_settings(auto(AutoVideoProcessor, family, folder, **PATCHES, **VIDEO_DEFAULTS | given))


@pytest.mark.parametrize("family", FAMILIES)
def test_invalid_videos_are_rejected_with_the_reason(family: str, tmp_path: Path) -> None:
    settings = settings_of(family, tmp_path)
    all_frames = dataclasses.replace(settings, sample_frames=False)
    with rejects("video: expected at least 2 frames", "found 1"):
        frame_indices(1, 1, all_frames)
    with rejects("video: expected at least 2 frames", "of 1"):
        frame_indices(1, 1, settings)
    with rejects("video: expected at least 2 frames", "found 1"):
        video_grid(1, 8, 8, settings)
    with rejects("video: expected an aspect ratio of at most 200"):
        video_grid(2, 2000, 8, settings)
    with rejects("video: expected sides of at least 1 pixel, found 8 x 0"):
        video_grid(2, 8, 0, settings)
    for rate in (None, 0, -1.0, float("inf"), float("nan")):
        with rejects("video: expected its frames per second, a positive number", str(rate)):
            frame_indices(8, rate, settings)
    with rejects("expected fps or num_frames, found 2 and 4"):
        frame_indices(8, 2, dataclasses.replace(settings, num_frames=4))


def test_what_only_one_processor_rejects(tmp_path: Path) -> None:
    settings = settings_of("qwen2_5_vl", tmp_path, fps=None, num_frames=8)
    with rejects("expected at least 8 frames (num_frames), found 7"):
        frame_indices(7, 2, settings)
    with rejects("expected fps or num_frames in the settings of the processor"):
        frame_indices(7, 2, dataclasses.replace(settings, num_frames=None))


def test_an_unknown_processor_is_rejected_by_its_class(tmp_path: Path) -> None:
    image, video = Qwen2VLImageProcessor(), auto(AutoVideoProcessor, "qwen3_vl", tmp_path, **PATCHES)
    with rejects("expected one of Qwen2VLImageProcessor", "found Qwen3VLVideoProcessor"):
        image_settings(video)
    with rejects("expected one of Qwen2VLVideoProcessor, Qwen3VLVideoProcessor", "found Qwen2VLImageProcessor"):
        video_settings(image)
    for processor, read in ((image, image_settings), (video, video_settings)):
        processor.do_resize = False
        with rejects("expected do_resize, found False"):
            read(processor)
    old = type("Qwen3VLVideoProcessor", (), {"do_resize": True})()
    old.cap_pixels_per_frame = True  # from a preprocessor_config.json
    with rejects("expected the setting cap_pixels_per_frame", "update transformers"):
        video_settings(old)
