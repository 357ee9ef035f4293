"""The arguments that say how images and videos are read and resized."""

import argparse
from dataclasses import fields
from typing import Any

from megatron_vlbridge.data.images import MediaOptions

HELP = {
    "max_image_pixels": "larger images and frames are rejected (%(default)s)",
    "min_pixels": "images are resized to at least this many pixels (the processor's)",
    "max_pixels": "images are resized to at most this many pixels (the processor's)",
    "video_min_pixels": "the same of videos: of each frame or of all sampled frames together, as for the processor",
    "video_max_pixels": "the same of videos: of each frame or of all sampled frames together, as for the processor",
    "video_total_pixels": "limit on the pixels of a whole video, its temporal patches counted as one frame",
    "video_fps": "frames per second to sample of video files (the processor's)",
    "video_min_frames": "least number of frames to sample of a video file (the processor's)",
    "url_cache": "folder into which images and videos at http and https URLs are fetched (URLs are rejected)",
    "video_max_frames": "greatest number of frames to sample of a video file (the processor's)",
}


def add_media_arguments(group: Any) -> None:
    """An argument for each field of `MediaOptions`."""
    for field in fields(MediaOptions):
        kind: type = {"video_fps": float, "url_cache": str}.get(field.name, int)
        group.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=HELP[field.name])


def media_options(args: argparse.Namespace) -> MediaOptions:
    """The options of `PackedConversations` that the arguments give."""
    return MediaOptions(**{field.name: getattr(args, field.name) for field in fields(MediaOptions)})
