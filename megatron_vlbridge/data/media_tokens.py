"""Grids and token counts of images and videos from their sizes alone, equal to those of transformers' processors.

Source: `smart_resize`, `resize` and `sample_frames` in models/qwen2_vl and models/qwen3_vl of transformers 5.23.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.processors import IMAGE_PROCESSORS, VIDEO_PROCESSORS

MAX_ASPECT_RATIO = 200

NOTHING: Mapping[str, Any] = MappingProxyType({})

type Grid = tuple[int, int, int]


@dataclass(frozen=True)
class ImageSettings:
    """How a processor resizes an image: to multiples of `patch_size * merge_size`, with pixels between the limits."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value is not False and value <= 0:
                raise VLBridgeError(f"{field.name}: expected a positive number, found {value}")

    @property
    def factor(self) -> int:
        """The side of a merged patch in pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class VideoSettings(ImageSettings):
    """How a processor samples the frames of a video and resizes them.

    With `limits_whole_video` the limits are for the pixels of all frames (Qwen3-VL), otherwise for those of each
    (Qwen2.5-VL). `cap_pixels_per_frame` is a further limit, from `max_video_tokens`. `total_pixels` limits the pixels
    of the whole video for both, where each temporal patch counts as one frame. Without `sample_frames` all frames are
    used.
    """

    temporal_patch_size: int
    limits_whole_video: bool
    sample_frames: bool
    fps: float | None
    num_frames: int | None
    min_frames: int
    max_frames: int
    cap_pixels_per_frame: bool
    max_video_tokens: int
    total_pixels: int | None = None


def image_settings(image_processor: Any, given: Mapping[str, Any] = NOTHING) -> ImageSettings:
    """The settings of a transformers image processor, with the `given` `min_pixels` and `max_pixels`.

    Raises VLBridgeError: its class is not in `families.processors`, it does not resize, a given value is invalid.
    """
    _check_class(image_processor, IMAGE_PROCESSORS)
    settings = ImageSettings(image_processor.patch_size, image_processor.merge_size, *_pixel_limits(image_processor))
    return _with_limits("image", settings, given)


def video_settings(video_processor: Any, given: Mapping[str, Any] = NOTHING) -> VideoSettings:
    """The settings of a transformers video processor, with the `given` ones.

    These are `min_pixels`, `max_pixels`, `total_pixels`, and `fps`, `min_frames` and `max_frames`, with any of which
    frames are sampled.

    Raises VLBridgeError: its class is not in `families.processors`, it does not resize, transformers is older than
    `cap_pixels_per_frame` (its formulas were others), or a given value is invalid.
    """
    _check_class(video_processor, VIDEO_PROCESSORS)
    # Of the class: an older one takes the setting from a preprocessor_config.json too, and ignores it.
    if not hasattr(type(video_processor), "cap_pixels_per_frame"):
        raise VLBridgeError(
            f"{type(video_processor).__name__}: expected the setting cap_pixels_per_frame, found none; for videos "
            "update transformers to 5.20 or newer"
        )
    settings = VideoSettings(
        video_processor.patch_size,
        video_processor.merge_size,
        *_pixel_limits(video_processor),
        temporal_patch_size=video_processor.temporal_patch_size,
        limits_whole_video=VIDEO_PROCESSORS[type(video_processor).__name__],
        sample_frames=bool(video_processor.do_sample_frames),
        fps=video_processor.fps,
        num_frames=video_processor.num_frames,
        min_frames=video_processor.min_frames,
        max_frames=video_processor.max_frames,
        cap_pixels_per_frame=bool(video_processor.cap_pixels_per_frame),
        max_video_tokens=video_processor.max_video_tokens,
    )
    if {"fps", "min_frames", "max_frames"} & given.keys():
        settings = replace(settings, sample_frames=True)
    if "fps" in given:
        settings = replace(settings, num_frames=None)
    settings = _with_limits("video", settings, given)
    if {"min_frames", "max_frames"} <= given.keys() and settings.min_frames > settings.max_frames:
        raise VLBridgeError(
            f"video: expected min_frames up to max_frames, found {settings.min_frames} and {settings.max_frames}"
        )
    return settings


def longest_edge(num_frames: int, settings: VideoSettings) -> int:
    """The `size["longest_edge"]` with which a processor keeps the limits of a video of `num_frames` frames.

    `total_pixels` is taken as by qwen-vl-utils.
    """
    if settings.total_pixels is None:
        return settings.max_pixels
    total = settings.total_pixels * settings.temporal_patch_size
    if settings.limits_whole_video:
        return min(settings.max_pixels, total)
    return max(min(settings.max_pixels, total // num_frames), int(settings.min_pixels * 1.05))


def image_grid(width: int, height: int, settings: ImageSettings) -> Grid:
    """The row of `image_grid_thw` of an image, in patches.

    Raises VLBridgeError: a side is not positive, or the aspect ratio is above 200, which processors reject.
    Example: `image_grid(640, 480, ImageSettings(16, 2, 65_536, 16_777_216))` is `(1, 30, 40)`.
    """
    _check_size("image", width, height)
    check_ratio("image", width, height)
    rows, columns = _resize(width, height, settings, (1, 1), settings.max_pixels)
    return 1, rows, columns


def check_ratio(kind: str, width: int, height: int) -> None:
    """Check the aspect ratio of an image or video (VLBridgeError if processors reject it)."""
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise VLBridgeError(
            f"{kind}: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, found {width} x {height}; crop it"
        )


def frame_indices(num_frames: int, fps: float | None, settings: VideoSettings) -> list[int]:
    """The frames that a processor takes of a video of `num_frames` frames, `fps` of them per second.

    Raises VLBridgeError: fewer frames than a temporal patch are left, the settings do not say how many to take, or the
    processor would take one after the last (by a rounding error, 14 of 17 frames for example), where it fails.
    """
    if not settings.sample_frames:
        indices = list(range(num_frames))
    elif settings.fps is not None and settings.num_frames is not None:
        raise VLBridgeError(f"video: expected fps or num_frames, found {settings.fps} and {settings.num_frames}")
    elif settings.limits_whole_video:
        count = _sampled_count(num_frames, fps, settings)
        indices = np.linspace(0, num_frames - 1, count).round().astype(int).tolist()
    else:
        count = _even_count(num_frames, fps, settings)
        indices = torch.arange(0, num_frames, num_frames / count).int().tolist() if count else []
    _check_frames(len(indices), settings, f" of {num_frames}")
    if indices[-1] >= num_frames:
        raise VLBridgeError(
            f"video: expected frames 0 to {num_frames - 1}, but the processor takes {len(indices)}, the last one "
            f"{indices[-1]}; use another fps"
        )
    return indices


def video_grid(num_frames: int, width: int, height: int, settings: VideoSettings) -> Grid:
    """The row of `video_grid_thw` of a video, of which `num_frames` frames are taken.

    Raises VLBridgeError: as `image_grid`, and for fewer frames than a temporal patch.
    Example: `video_grid(len(frame_indices(90, 30, settings)), 640, 480, settings)`.
    """
    _check_size("video", width, height)
    _check_frames(num_frames, settings)
    frames = (1, 1)
    if settings.limits_whole_video:
        frames = num_frames, round(num_frames / settings.temporal_patch_size) * settings.temporal_patch_size
        scale = max(settings.factor / height, settings.factor / width)
        if scale > 1:
            width, height = int(width * scale), int(height * scale)
    check_ratio("video", width, height)
    rows, columns = _resize(width, height, settings, frames, _max_pixels(num_frames, settings))
    return -(-num_frames // settings.temporal_patch_size), rows, columns


def grid_tokens(grid: Grid, merge_size: int) -> int:
    """The placeholder tokens of an image or video with this grid; those for its start and end are not counted."""
    return math.prod(grid) // merge_size**2


def _resize(
    width: int, height: int, settings: ImageSettings, frames: tuple[int, int], max_pixels: int
) -> tuple[int, int]:
    """Rows and columns of patches. `frames` is their number, and the number by which the limits are compared."""
    factor, (count, compared) = settings.factor, frames
    rows, columns = round(height / factor), round(width / factor)
    pixels = compared * rows * columns * factor**2
    if pixels > max_pixels:
        scale = math.sqrt(count * height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / scale / factor)) for side in (height, width))
    elif pixels < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / (count * height * width))
        rows, columns = (math.ceil(side * scale / factor) for side in (height, width))
    return rows * settings.merge_size, columns * settings.merge_size


def _max_pixels(num_frames: int, settings: VideoSettings) -> int:
    """The upper limit of a video, for all its frames or for each, see `VideoSettings`."""
    highest = longest_edge(num_frames, settings)
    if not settings.cap_pixels_per_frame:
        return highest
    pixels, lowest = settings.max_video_tokens * settings.factor**2, int(settings.min_pixels * 1.05)
    if settings.limits_whole_video:
        return max(min(pixels, highest // num_frames), lowest) * num_frames
    share = int(pixels * 0.9) * settings.temporal_patch_size // num_frames
    return max(min(highest, share), lowest)


def _sampled_count(num_frames: int, fps: float | None, settings: VideoSettings) -> int:
    """Any number of frames, first and last among them."""
    if settings.num_frames is not None:
        return settings.num_frames
    if settings.fps is None:
        return min(max(num_frames, settings.min_frames), settings.max_frames)
    count = int(_seconds(num_frames, fps) * settings.fps)
    return min(max(count, settings.min_frames), settings.max_frames, num_frames)


def _even_count(num_frames: int, fps: float | None, settings: VideoSettings) -> int:
    """A multiple of the temporal patch size, taken at equal steps."""
    unit = settings.temporal_patch_size
    if settings.num_frames is not None:
        count = round(settings.num_frames / unit) * unit
        if count > num_frames:
            raise VLBridgeError(f"video: expected at least {count} frames (num_frames), found {num_frames}")
        return count
    if settings.fps is None:
        raise VLBridgeError("video: expected fps or num_frames in the settings of the processor, found none")
    highest = min(settings.max_frames, num_frames) // unit * unit
    wanted = min(max(_seconds(num_frames, fps) * settings.fps, settings.min_frames), highest)
    return math.floor(wanted / unit) * unit


def _seconds(num_frames: int, fps: float | None) -> float:
    if fps is None or not 0 < fps < math.inf:
        raise VLBridgeError(f"video: expected its frames per second, a positive number, found {fps}")
    return num_frames / fps


def _with_limits[S: ImageSettings](kind: str, settings: S, given: Mapping[str, Any]) -> S:
    for name, value in given.items():
        numbers = (int, float) if name == "fps" else (int,)
        if isinstance(value, bool) or not isinstance(value, numbers) or not 0 < value < math.inf:
            what = "number" if name == "fps" else "integer"
            raise VLBridgeError(f"{kind}: expected a positive {what} under {name!r}, found {value!r}")
    settings = replace(settings, **given)
    highest = settings.max_pixels
    if isinstance(settings, VideoSettings) and settings.limits_whole_video:
        highest = longest_edge(1, settings)  # any number of frames
    if {"min_pixels", "max_pixels", "total_pixels"} & given.keys() and highest < settings.min_pixels:
        raise VLBridgeError(
            f"{kind}: expected an upper limit (max_pixels, total_pixels) of at least min_pixels, found {highest} and "
            f"{settings.min_pixels}; what is not given is that of the processor"
        )
    return settings


def _pixel_limits(processor: Any) -> tuple[int, int]:
    return processor.size["shortest_edge"], processor.size["longest_edge"]


def _check_class(processor: Any, known: Any) -> None:
    name = type(processor).__name__
    if name not in known:
        raise VLBridgeError(f"processor: expected one of {', '.join(sorted(known))}, found {name}")
    if not processor.do_resize:
        raise VLBridgeError(f"{name}: expected do_resize, found {processor.do_resize}")


def _check_size(kind: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise VLBridgeError(f"{kind}: expected sides of at least 1 pixel, found {width} x {height}")


def _check_frames(count: int, settings: VideoSettings, total: str = "") -> None:
    least = settings.temporal_patch_size
    if count < least:
        raise VLBridgeError(f"video: expected at least {least} frames (temporal_patch_size), found {count}{total}")
