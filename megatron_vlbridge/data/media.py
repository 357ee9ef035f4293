"""Load the images and videos of a conversation as inputs of the processor, or measure them without decoding."""

import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata

from megatron_vlbridge.data.images import MediaOptions, is_image_file, is_url, read_image, read_image_size
from megatron_vlbridge.data.media_tokens import (
    Grid,
    VideoSettings,
    frame_indices,
    grid_tokens,
    image_grid,
    image_settings,
    longest_edge,
    video_grid,
    video_settings,
)
from megatron_vlbridge.data.url_cache import fetch, is_http
from megatron_vlbridge.data.video_files import (
    VideoFile,
    VideoHeader,
    is_video_file,
    read_video_frames,
    read_video_header,
)
from megatron_vlbridge.data.video_prompt import timestamps
from megatron_vlbridge.errors import VLBridgeError

type Message = dict[str, Any]
type Conversation = list[Message]
# The `size` of a processor, shortest_edge and longest_edge; None: its own.
type Size = dict[str, int] | None

DEFAULTS = MediaOptions()
LIMITS = ("min_pixels", "max_pixels")
VIDEO_LIMITS = (*LIMITS, "total_pixels")
SAMPLING = ("fps", "min_frames", "max_frames")
CLIP = ("video_start", "video_end")


class Video(NamedTuple):
    """Frames uint8 `[F, 3, H, W]`, their timestamps, and the size to which they are resized."""

    frames: Tensor
    metadata: VideoMetadata
    size: Size = None


class MediaShape(NamedTuple):
    """The grid of an image or a video, and of a Qwen3-VL video the text before each temporal patch."""

    grid: Grid
    timestamps: list[str]


def load_image(part: dict[str, Any], options: MediaOptions = DEFAULTS) -> Image.Image:
    """Load the image of a part `{"type": "image", "image": path, bytes or PIL image}` as RGB (see `images.read_image`).

    Raises VLBridgeError: the image or the file is missing, or it cannot be read as 8-bit RGB without loss.
    """
    return read_image(_image(with_files(part, options)), "image", options)


def image_size(part: dict[str, Any], image_processor: Any, options: MediaOptions = DEFAULTS) -> Size:
    """The `size` with which the processor is called for an image, from `min_pixels` and `max_pixels`.

    Raises VLBridgeError: a value is invalid, or the class of the processor is unknown.
    Example: `image_size({"image": "a.png", "max_pixels": 50_176}, processor.image_processor)`.
    """
    given = _given(part, LIMITS, options)
    if not given:
        return None
    settings = image_settings(image_processor, given)
    return {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}


def load_video(part: dict[str, Any], options: MediaOptions = DEFAULTS, video_processor: Any = None) -> Video:
    """Load the frames of a part `{"type": "video", "video": a file or frames}`.

    A file is a path or its content, bytes. Of it those frames are decoded that the processor samples, with `fps`
    (frames per second wanted), `min_frames` and `max_frames` in place of its own, between `video_start` and `video_end`
    (seconds). Frames are a uint8 tensor `[F, 3, H, W]`, or a list of paths or PIL images of the same size, read like
    images; all are used, and `fps` is theirs. The timestamp of a frame is its index, in the file or list, over the
    frames per second.

    Raises VLBridgeError: a value is missing or invalid, the file or a frame (named by its index) cannot be read, or the
    frames differ in size.
    """
    part = with_files(part, options)
    source = part.get("video")
    _check_video_source(source)
    if is_file(source):
        header, indices, total = _sampled(part, options, video_processor)
        fps, frames = header.fps, read_video_frames(source, indices, header)
    else:
        fps, frames = _frames_per_second(part), _frames(source, options)
        total, indices = len(frames), list(range(len(frames)))
    height, width = frames.shape[2:]
    metadata = VideoMetadata(
        total_num_frames=total, fps=fps, width=width, height=height, duration=total / fps, frames_indices=indices
    )
    return Video(frames, metadata, _video_size(part, options, video_processor, len(frames)))


def media_grid(part: dict[str, Any], processor: ProcessorMixin, options: MediaOptions = DEFAULTS) -> Grid:
    """The grid of the image or video of a part, see `media_shape`."""
    return media_shape(part, processor, options).grid


def media_shape(part: dict[str, Any], processor: ProcessorMixin, options: MediaOptions = DEFAULTS) -> MediaShape:
    """The grid and timestamps that the processor gives an image or video, from the headers of files alone.

    Raises VLBridgeError: as `load_image` and `load_video`, except for what only decoding shows; the processor rejects
    the image or video, or its class is unknown.
    Example: `media_shape({"type": "image", "image": "a.png"}, processor).grid` is `(1, 30, 40)` for 640 x 480 pixels.
    """
    part = with_files(part, options)
    if part["type"] == "image":
        settings = image_settings(processor.image_processor, _given(part, LIMITS, options))
        return MediaShape(image_grid(*read_image_size(_image(part), "image", options), settings), [])
    _check_video_source(part.get("video"))
    limits = video_settings(processor.video_processor, _given(part, VIDEO_LIMITS, options, "video_"))
    if is_file(part.get("video")):
        header, indices, _ = _sampled(part, options, processor.video_processor)
        fps, width, height = header.fps, header.width, header.height
    else:
        fps = _frames_per_second(part)
        count, width, height = _frames_size(part.get("video"), options)
        indices = list(range(count))
    grid = video_grid(len(indices), width, height, limits)
    # The two kinds of video processors also differ in the text of a video.
    stamps = timestamps(indices, fps, limits.temporal_patch_size) if limits.limits_whole_video else []
    return MediaShape(grid, stamps)


def with_files(part: dict[str, Any], options: MediaOptions) -> dict[str, Any]:
    """The part of an image or video with files in place of URLs, if `options.url_cache` is given.

    Raises VLBridgeError: see `url_cache.fetch`.
    """
    key = "video" if "video" in part else "image"
    folder, source = options.url_cache, part.get(key)
    if folder is None:
        return part
    if isinstance(source, list):
        return {**part, key: [fetch(one, folder, is_image_file) if is_http(one) else one for one in source]}
    if not is_http(source):
        return part
    return {**part, key: fetch(str(source), folder, is_video_file if key == "video" else is_image_file)}


def placeholder_text(kind: str, shape: MediaShape, processor: ProcessorMixin) -> str:
    """What the processor writes in place of the placeholder token of an image or video.

    Example: `placeholder_text("image", MediaShape((1, 4, 2), []), processor)` is `"<|image_pad|><|image_pad|>"`.
    """
    token = processor.image_token if kind == "image" else processor.video_token
    count = grid_tokens(shape.grid, getattr(processor, f"{kind}_processor").merge_size)
    if not shape.timestamps:
        return token * count
    frame = processor.vision_start_token + token * (count // shape.grid[0]) + processor.vision_end_token
    return "".join(stamp + frame for stamp in shape.timestamps)


def is_file(source: object) -> TypeGuard[VideoFile]:
    """Whether the source of a video is a file, by its path or as bytes."""
    return isinstance(source, str | Path | bytes) and not is_url(source)


def _image(part: dict[str, Any]) -> str | Path | bytes | Image.Image:
    return _source(part.get("image"), "image", " under the key 'image'")


def _given(part: dict[str, Any], names: Sequence[str], options: MediaOptions, prefix: str = "") -> dict[str, Any]:
    """The values of a part, or else those of the options."""
    values = {name: part.get(name, getattr(options, prefix + name)) for name in names}
    return {name: value for name, value in values.items() if value is not None or name in part}


def _sampled(part: dict[str, Any], options: MediaOptions, processor: Any) -> tuple[VideoHeader, list[int], int]:
    """The header of a file, the indices of the sampled frames, and the number of frames that they are sampled of."""
    header = read_video_header(part["video"], options.max_image_pixels)
    settings = _settings(processor, _given(part, SAMPLING, options, "video_"))
    clip = _clip(part, header)
    indices = [clip[index] for index in frame_indices(len(clip), header.fps, settings)]
    return header, indices, len(clip)


def _clip(part: dict[str, Any], header: VideoHeader) -> range:
    """The frames between `video_start` and `video_end`, counted as by qwen-vl-utils."""
    seconds = header.num_frames / header.fps
    start, end = part.get("video_start", 0.0), part.get("video_end", seconds)
    for name, value in (("video_start", start), ("video_end", end)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise VLBridgeError(f"video: expected seconds under {name!r}, a number from 0, found {value!r}")
    first, last = math.ceil(min(start, seconds) * header.fps), math.floor(min(end, seconds) * header.fps)
    clip = range(first, min(last, header.num_frames - 1) + 1)
    if not clip:
        raise VLBridgeError(
            f"video: expected frames between video_start and video_end, found none between {start} and {end} s of "
            f"{seconds:.2f} s"
        )
    return clip


def _video_size(part: dict[str, Any], options: MediaOptions, processor: Any, num_frames: int) -> Size:
    given = _given(part, VIDEO_LIMITS, options, "video_")
    if not given:
        return None
    settings = _settings(processor, given)
    return {"shortest_edge": settings.min_pixels, "longest_edge": longest_edge(num_frames, settings)}


def _settings(processor: Any, given: dict[str, Any]) -> VideoSettings:
    if processor is None:
        raise VLBridgeError("video: a file and limits need the processor: load_video(part, options, video_processor)")
    return video_settings(processor, given)


def _frames_per_second(part: dict[str, Any]) -> float:
    """The `fps` of a video that is given as frames."""
    unused = [name for name in ("min_frames", "max_frames", *CLIP) if name in part]
    if unused:
        raise VLBridgeError(f"video: {unused[0]!r} is for video files, and frames are all used; remove it")
    fps: Any = part.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < float(fps) < math.inf:
        raise VLBridgeError(
            f"video: expected the frames per second under the key 'fps', a positive number, found {fps!r}"
        )
    return float(fps)


def _frames(source: Any, options: MediaOptions) -> Tensor:
    if isinstance(source, Tensor):
        if source.dim() != 4 or source.shape[1] != 3 or source.dtype != torch.uint8 or source.numel() == 0:
            raise VLBridgeError(f"video: expected frames uint8 [F, 3, H, W], found {source.dtype} {list(source.shape)}")
        return source
    named = [(f"video frame {index}", frame) for index, frame in enumerate(source)]
    images = [read_image(_source(frame, name), name, options) for name, frame in named]
    _same_size([image.size for image in images])
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def _check_video_source(source: object) -> None:
    """Reject what is neither a file nor frames."""
    if isinstance(source, Tensor | str | Path | bytes) and not is_url(source):
        return
    if isinstance(source, list) and source:
        return
    if is_url(source):
        raise VLBridgeError(
            f"video: {shown(source)} is a URL, which is not supported; download it first, or give --url-cache DIR"
        )
    raise VLBridgeError(
        "video: expected a file or frames under the key 'video' (a path, a uint8 tensor [F, 3, H, W], or a list of "
        f"paths or PIL images), found {shown(source)}"
    )


def _frames_size(source: Any, options: MediaOptions) -> tuple[int, int, int]:
    """Number, width and height of frames, from the headers of their files."""
    if isinstance(source, Tensor):
        frames = _frames(source, options)
        return len(frames), frames.shape[3], frames.shape[2]
    named = [(f"video frame {index}", frame) for index, frame in enumerate(source)]
    return len(source), *_same_size([read_image_size(_source(frame, name), name, options) for name, frame in named])


def _same_size(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    if len(set(sizes)) > 1:
        raise VLBridgeError(f"video: expected frames of the same size, found (width, height) {sorted(set(sizes))}")
    return sizes[0]


def _source(source: object, name: str, where: str = "") -> str | Path | bytes | Image.Image:
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise VLBridgeError(f"{name}: expected a path or a PIL image{where}, found {shown(source)}")
    return source


def shown(value: object) -> str:
    """A value in an error: its type, and the first characters of its text."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:80]!r}"
