"""Load the images and videos of a conversation as inputs of the processor."""

import math
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from megatron_vlbridge.data.images import MediaOptions, is_url, read_image
from megatron_vlbridge.errors import VLBridgeError

type Message = dict[str, Any]
type Conversation = list[Message]

DEFAULTS = MediaOptions()
DECODE = "decode a video file into frames first"


class Video(NamedTuple):
    """Frames uint8 `[F, 3, H, W]` and their timestamps."""

    frames: Tensor
    metadata: VideoMetadata


def load_image(part: dict[str, Any], options: MediaOptions = DEFAULTS) -> Image.Image:
    """Load the image of a part `{"type": "image", "image": path or PIL image}` as RGB (see `images.read_image`).

    Raises VLBridgeError: the image or the file is missing, or it cannot be read as 8-bit RGB without loss.
    """
    return read_image(_source(part.get("image"), "image", " under the key 'image'"), "image", options)


def load_video(part: dict[str, Any], options: MediaOptions = DEFAULTS) -> Video:
    """Load the frames of a content part `{"type": "video", "video": frames, "fps": frames per second}`.

    Frames are a uint8 tensor `[F, 3, H, W]`, or a list of paths or PIL images of the same size, read like images. All
    frames are used; the timestamp of frame k is k / fps. Video files are not decoded.

    Raises VLBridgeError: the frames have another type, cannot be read (the error names the index of the frame) or
    differ in size, or `fps` is missing or not a positive finite number.
    """
    fps: Any = part.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < float(fps) < math.inf:
        raise VLBridgeError(
            f"video: expected the frames per second under the key 'fps', a positive number, found {fps!r}"
        )
    fps = float(fps)
    frames = _frames(part.get("video"), options)
    count, _, height, width = frames.shape
    metadata = VideoMetadata(
        total_num_frames=count,
        fps=fps,
        width=width,
        height=height,
        duration=count / fps,
        frames_indices=list(range(count)),
    )
    return Video(frames, metadata)


def _frames(source: object, options: MediaOptions) -> Tensor:
    if isinstance(source, Tensor):
        if source.dim() != 4 or source.shape[1] != 3 or source.dtype != torch.uint8 or source.numel() == 0:
            raise VLBridgeError(f"video: expected frames uint8 [F, 3, H, W], found {source.dtype} {list(source.shape)}")
        return source
    if isinstance(source, list) and source:
        named = [(f"video frame {index}", frame) for index, frame in enumerate(source)]
        images = [read_image(_source(frame, name), name, options) for name, frame in named]
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            raise VLBridgeError(f"video: expected frames of the same size, found (width, height) {sizes}")
        return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    if is_url(source):
        raise VLBridgeError(f"video: {shown(source)} is a URL, which is not supported; download it and {DECODE}")
    raise VLBridgeError(
        "video: expected frames under the key 'video' (uint8 tensor [F, 3, H, W], or a list of paths or PIL "
        f"images), found {shown(source)}; {DECODE}"
    )


def _source(source: object, name: str, where: str = "") -> str | Path | Image.Image:
    if not isinstance(source, str | Path | Image.Image):
        raise VLBridgeError(f"{name}: expected a path or a PIL image{where}, found {shown(source)}")
    return source


def shown(value: object) -> str:
    """A value in an error: its type, and the first characters of its text."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:80]!r}"
