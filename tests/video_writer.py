"""Video files for the tests, encoded by PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def moving(count: int, width: int = 48, height: int = 32, seed: int = 0) -> np.ndarray:
    """Frames uint8 `[count, height, width, 3]`, each different: a window that moves over blocks of random colors."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, (width + 3 * count) // 8 + 1, 3), np.uint8)
    wide = blocks.repeat(8, 0).repeat(8, 1)
    return np.stack([wide[:height, 3 * index : 3 * index + width] for index in range(count)])


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: int | Fraction = 30,
    codec: str = "mpeg4",
    *,
    matrix: Sequence[int] | None = None,
    times: Sequence[int] | None = None,
    shift: int = 0,
    **options: str,
) -> Path:
    """Encode frames `[F, H, W, 3]`, with a display matrix, and at these milliseconds in place of a constant rate.

    `shift`: all times this many frames earlier, so that an edit list hides the first ones.
    """
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=fps, options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        packets = []
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode(None)]:
            if shift:
                ticks = round(shift / fps / packet.time_base)
                packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
            container.mux(packet)
    return path


def decoded(path: Path) -> np.ndarray:
    """All frames of a file as stored, uint8 `[F, H, W, 3]`."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# Name -> file name, how it is encoded, and its frames, width and height.
FILES: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "h264": ("a.mp4", {"codec": "libx264"}, (75, 48, 32)),
    "mpeg4": ("a.mp4", {}, (31, 48, 32)),
    "avi": ("a.avi", {"fps": 12}, (25, 48, 32)),
    "29.97": ("a.mp4", {"fps": Fraction(30000, 1001)}, (64, 32, 40)),
    "odd size": ("a.mp4", {"fps": 10}, (13, 33, 21)),
    "two frames": ("a.mp4", {}, (2, 48, 32)),
    "three frames": ("a.mp4", {"fps": 1}, (3, 48, 32)),
    "matroska": ("a.mkv", {"codec": "libx264"}, (41, 48, 32)),
    "webm": ("a.webm", {"codec": "libvpx-vp9"}, (20, 48, 32)),
    "mpegts": ("a.ts", {"codec": "libx264"}, (50, 48, 32)),
    "fragmented": ("a.mp4", {"codec": "libx264", "movflags": "frag_keyframe+empty_moov"}, (45, 48, 32)),
    "header in front": ("a.mp4", {"movflags": "+faststart"}, (20, 48, 32)),
}
COUNTED_BY_PACKETS = ("matroska", "webm", "mpegts", "fragmented")


def video_file(name: str, folder: Path) -> Path:
    """One of `FILES`."""
    path, options, size = FILES[name]
    return write_video(folder / path, moving(*size), **options)
