"""Pictures and videos of a conversation, as the processor takes them."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers.video_utils import VideoMetadata

from megatron_vlbridge.errors import VLBridgeError

type Message = dict[str, Any]
type Conversation = list[Message]


class Video(NamedTuple):
    """Frames uint8 `[F, 3, H, W]` and their times."""

    frames: Tensor
    metadata: VideoMetadata


def load_image(part: dict[str, Any]) -> Image.Image:
    """The picture of a content part `{"type": "image", "image": path or PIL image}`, in RGB.

    Raises:
        VLBridgeError: there is no picture, no such file, or the file is not a picture.
    """
    source = part.get("image")
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, str | Path):
        raise VLBridgeError(f"image: expected a path or a PIL image under the key 'image', found {_kind(source)}")
    try:
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (FileNotFoundError, IsADirectoryError):
        raise VLBridgeError(f"image: no file {str(source)!r}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise VLBridgeError(f"image: {str(source)!r} cannot be read as a picture ({error})") from error


def load_video(part: dict[str, Any]) -> Video:
    """The frames of a content part `{"type": "video", "video": frames, "fps": frames per second}`.

    Frames are a uint8 tensor `[F, 3, H, W]`, or a list of paths or PIL images of one size. They are all used: none is
    left out, and the time of frame k is k / fps. Video files are not decoded here.

    Raises:
        VLBridgeError: the frames are something else or differ in size, or `fps` is missing or not positive.
    """
    source, fps = part.get("video"), part.get("fps")
    if isinstance(source, Tensor):
        frames = source
        if frames.dim() != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
            raise VLBridgeError(f"video: expected frames uint8 [F, 3, H, W], found {frames.dtype} {list(frames.shape)}")
    elif isinstance(source, list) and source:
        frames = _stack([load_image({"image": frame}) for frame in source])
    else:
        raise VLBridgeError(
            "video: expected frames under the key 'video' (uint8 tensor [F, 3, H, W], or a list of paths or PIL "
            f"images), found {_kind(source)}; decode a video file into frames first"
        )
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
        raise VLBridgeError(
            f"video: expected under the key 'fps' the frames per second, a positive number, found {fps!r}"
        )
    count, _, height, width = frames.shape
    metadata = VideoMetadata(
        total_num_frames=count,
        fps=float(fps),
        width=width,
        height=height,
        duration=count / fps,
        frames_indices=list(range(count)),
    )
    return Video(frames, metadata)


def _stack(pictures: list[Image.Image]) -> Tensor:
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise VLBridgeError(f"video: expected frames of one size, found (width, height) {sizes}")
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def _kind(source: object) -> str:
    return "nothing" if source is None else f"{type(source).__name__} {str(source)[:80]!r}"
