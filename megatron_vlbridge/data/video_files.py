"""Read video files with PyAV: the header without decoding, and those frames that are wanted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_vlbridge.errors import VLBridgeError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# A path, or the content.
type VideoFile = str | Path | bytes

# FFmpeg's names. It would also open playlists (which name other files), text (as ANSI art) and images.
FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif", "ivf")
ONE = 1 << 16  # of the fixed-point values of a display matrix
LONGEST_GAP = 1.0  # seconds between the end of the packets and the end that the header states


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video file without decoding it; `width` and `height` are those of the upright frames.

    `fps` is the average over the file, as in transformers. `turn` are the steps that make a stored frame upright: swap
    rows and columns, then reverse the columns, then the rows.
    """

    num_frames: int
    fps: float
    width: int
    height: int
    turn: tuple[bool, bool, bool] = (False, False, False)


def is_video_file(path: VideoFile) -> bool:
    """Whether a file has one of `FORMATS` and a video stream (VLBridgeError if PyAV is not installed)."""
    try:
        with _opened(path):
            return True
    except VLBridgeError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        return False


def read_video_header(path: VideoFile, max_pixels: int) -> VideoHeader:
    """The header of a video file, given by its path or its content.

    Where it has no number of frames (Matroska, WebM, MPEG-TS), packets are counted.

    Raises VLBridgeError, with the path: no file, PyAV is not installed, not one of `FORMATS`, no video stream, no frame
    rate, more than `max_pixels` pixels in a frame, a rotation that is not a multiple of 90 degrees, a file that ends
    before the duration in its header.
    Example: `read_video_header("clip.mp4", 10**8).num_frames`.
    """
    with _opened(path) as (container, stream):
        if stream.codec_context is None:
            raise VLBridgeError("has a codec that PyAV cannot decode; encode it again")
        turn = _turn(stream)
        width, height = stream.width, stream.height
        if not 0 < width * height <= max_pixels:
            raise VLBridgeError(
                f"has frames of {width} x {height}: expected 1 to {max_pixels} pixels (max_image_pixels)"
            )
        if not stream.average_rate:
            raise VLBridgeError("has no frame rate; encode it again")
        fps = float(stream.average_rate)
        num_frames = _counted_in_header(container, stream) or _counted_packets(container, stream)
        if num_frames > (size := len(path) if isinstance(path, bytes) else Path(path).stat().st_size):
            raise VLBridgeError(f"is damaged: {num_frames} frames in its header, and it has {size} bytes")
        return VideoHeader(num_frames, fps, *((height, width) if turn[0] else (width, height)), turn)


def read_video_frames(path: VideoFile, indices: Sequence[int], header: VideoHeader) -> Tensor:
    """The upright frames with these indices, uint8 `[len(indices), 3, height, width]`.

    All frames up to the last of them are decoded, one at a time; the others are not kept.

    Raises VLBridgeError, with the path: as `read_video_header`, a frame that is missing or damaged, frames that differ
    from the header in size or rotation.
    Example: `read_video_frames("clip.mp4", [0, 15, 29], read_video_header("clip.mp4", 10**8))`.
    """
    frames = torch.empty(len(indices), 3, header.height, header.width, dtype=torch.uint8)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    last, decoded = max(indices), 0
    with _opened(path) as (container, stream):
        from av.video.reformatter import VideoReformatter

        # PyAV's own is kept for the thread, and its threads are missing in a forked process: it would wait forever.
        reformatter = VideoReformatter()
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise VLBridgeError(f"is damaged at frame {index}; encode it again")
            if index in places:
                upright = _upright(reformatter.reformat(frame, format="rgb24").to_ndarray(), header.turn)
                found = upright.shape[1], upright.shape[0], frame.rotation % 360
                expected = header.width, header.height, _degrees(header.turn)
                if found != expected:
                    raise VLBridgeError(
                        f"changes at frame {index}: expected (width, height, rotation) {expected} as in the header, "
                        f"found {found}; encode it again"
                    )
                frames[places[index]] = torch.from_numpy(upright).permute(2, 0, 1)
            if index == last:
                return frames
            decoded = index + 1
        raise VLBridgeError(
            f"is cut or damaged: expected {header.num_frames} frames, decoded {decoded}; encode it again"
        )


@contextmanager
def _opened(path: VideoFile) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """A container and its video stream; errors in the block name the file."""
    where = f"video: {len(path)} bytes" if isinstance(path, bytes) else f"video: {str(path)!r}"
    try:
        import av
    except ImportError as error:
        raise VLBridgeError(f"{where}: video files need PyAV: pip install 'megatron-vlbridge[video]'") from error
    if not isinstance(path, bytes):
        _check_file(path, where)
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:
        # With the prefix, a name such as `concat:a` is a file too.
        file = BytesIO(path) if isinstance(path, bytes) else f"file:{path}"
        with av.open(file, mode="r", options=options) as container:
            covers = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not streams:
                raise VLBridgeError("has no video stream")
            yield container, streams[0]
    except VLBridgeError as error:
        raise VLBridgeError(f"{where} {error}") from error
    except av.FFmpegError as error:
        raise VLBridgeError(
            f"{where} cannot be decoded as a video of the formats {', '.join(FORMATS)} "
            f"({type(error).__name__}: {error.strerror})"
        ) from error


def _check_file(path: str | Path, where: str) -> None:
    try:
        exists = Path(path).is_file()
    except OSError as error:
        raise VLBridgeError(f"{where} cannot be read: {error.strerror}") from error
    if not exists:
        raise VLBridgeError(f"video: no file {str(path)!r}")


def _counted_in_header(container: "InputContainer", stream: "VideoStream") -> int:
    """The number of frames, without those that an edit list hides; 0 if the header does not have it."""
    if stream.frames and container.format.name.startswith("mov"):
        return sum(not entry.is_discard for entry in stream.index_entries) or stream.frames
    return stream.frames


def _counted_packets(container: "InputContainer", stream: "VideoStream") -> int:
    count, ends = 0, [0.0]
    for packet in container.demux():
        if packet.pts is not None:
            ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
        count += packet.stream is stream and packet.size > 0
    seconds = (container.duration or 0) / 1e6
    if max(ends) + LONGEST_GAP < seconds:
        raise VLBridgeError(f"is cut: expected {seconds:.2f} seconds as in its header, found {max(ends):.2f}")
    return count


def _turn(stream: "VideoStream") -> tuple[bool, bool, bool]:
    """How the display matrix [[a, b], [c, d]] turns a frame: column' = a column + c row, row' = b column + d row."""
    matrix = stream.codec_context.coded_side_data.get("display_matrix")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if sorted(map(abs, (a, b, c, d))) != [0, 0, ONE, ONE] or a * d == b * c:
        raise VLBridgeError("is rotated or scaled: expected a multiple of 90 degrees; encode it again")
    return a == 0, a + c < 0, b + d < 0


def _upright(frame: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    swap, columns, rows = turn
    frame = frame.swapaxes(0, 1) if swap else frame
    frame = frame[:, ::-1] if columns else frame
    return np.ascontiguousarray(frame[::-1] if rows else frame)


def _degrees(turn: tuple[bool, bool, bool]) -> int:
    """The rotation as PyAV gives it, counterclockwise; of a mirrored frame that of its columns."""
    swap, columns, rows = turn
    return (90 if rows else 270) if swap else (180 if columns else 0)
