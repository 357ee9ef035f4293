"""A video file is read from its header and decoded upright, or rejected with its name."""

import itertools
import math
import multiprocessing
import struct
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import load_video as reference_load_video

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.media import load_video
from megatron_vlbridge.data.video_files import read_video_frames, read_video_header
from megatron_vlbridge.demo.tiny_processor import build_processor
from megatron_vlbridge.errors import VLBridgeError
from tests.errors import rejects
from tests.unit.time_limit import limit
from tests.video_writer import COUNTED_BY_PACKETS, FILES, decoded, moving, video_file, write_video

MANY = 10**9
PATCHES: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "cap_pixels_per_frame": False}
PATCHES["size"] = {"shortest_edge": 64, "longest_edge": 64 * 400}
ONE = 1 << 16


def processor_3(**settings: Any) -> Qwen3VLVideoProcessor:
    return Qwen3VLVideoProcessor(**PATCHES | settings)


@pytest.fixture(scope="module")
def qwen3() -> Qwen3VLProcessor:
    return build_processor(["hello", "seven"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 24)


def part(path: Path | str, **keys: Any) -> dict[str, Any]:
    return {"type": "video", "video": str(path), **keys}


def talk(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "seven"},
    ]


# ---- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_the_header_has_what_decoding_gives(name: str, tmp_path: Path) -> None:
    path = video_file(name, tmp_path)
    header, frames = read_video_header(path, MANY), decoded(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames == 0) == (name in COUNTED_BY_PACKETS)
        rate = float(stream.average_rate)
    assert (header.num_frames, header.height, header.width) == frames.shape[:3]
    assert header.num_frames == FILES[name][2][0]
    assert header.fps == rate
    every = read_video_frames(path, range(len(frames)), header)
    np.testing.assert_array_equal(every.permute(0, 2, 3, 1).numpy(), frames)


# ---- rotation, hidden frames, variable rates ------------------------------------------------------------------------

TURNS = [
    matrix
    for matrix in itertools.product((-ONE, 0, ONE), repeat=4)
    if abs(matrix[0] * matrix[3] - matrix[1] * matrix[2]) == ONE * ONE and matrix.count(0) == 2
]


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_a_display_matrix_is_applied(turn: tuple[int, ...], tmp_path: Path) -> None:
    a, b, c, d = turn
    path = write_video(tmp_path / "a.mp4", moving(4), matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    stored = decoded(path)
    # Every pixel at (column, row) [[a, b], [c, d]], moved so that the least is at (0, 0).
    places = {}
    for row, column in np.ndindex(*stored.shape[1:3]):
        places[(a * column + c * row) // ONE, (b * column + d * row) // ONE] = stored[:, row, column]
    columns, rows = (sorted({place[axis] for place in places}) for axis in (0, 1))
    expected = np.stack([np.stack([places[x, y] for x in columns], 1) for y in rows], 1)
    header = read_video_header(path, MANY)
    assert (header.height, header.width) == expected.shape[1:3]
    found = read_video_frames(path, range(4), header).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, expected)
    if a * d - b * c > 0:
        with av.open(str(path)) as container:
            degrees = next(container.decode(video=0)).rotation
        np.testing.assert_array_equal(found, np.rot90(stored, degrees // 90, (1, 2)))


def test_all_eight_turns_were_tested() -> None:
    assert len(TURNS) == 8


@pytest.mark.parametrize(
    "turn", [(46341, 46341, -46341, 46341), (2 * ONE, 0, 0, ONE), (ONE, ONE, 0, 0), (ONE, 0, ONE, 0)]
)
def test_another_matrix_is_rejected(turn: tuple[int, ...], tmp_path: Path) -> None:
    a, b, c, d = turn
    path = write_video(tmp_path / "a.mp4", moving(4), matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    with rejects("is rotated or scaled: expected a multiple of 90 degrees", start=f"video: '{path}' "):
        read_video_header(path, MANY)


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(40), 10, codec="libx264", shift=15)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
    frames = decoded(path)
    assert read_video_header(path, MANY).num_frames == len(frames) == 25
    video = load_video(part(path), video_processor=processor_3())
    np.testing.assert_array_equal(video.frames.permute(0, 2, 3, 1).numpy(), frames[video.metadata.frames_indices])


def test_a_variable_rate_counts_as_its_average_as_in_transformers(tmp_path: Path) -> None:
    times = [0, 33, 66, 200, 233, 400, 433, 466, 900, 1000]
    path = write_video(tmp_path / "a.mp4", moving(10), codec="libx264", times=times)
    video = load_video(part(path, fps=4), video_processor=processor_3())
    own, metadata = reference_load_video(
        str(path), backend="pyav", sample_indices_fn=partial(processor_3().sample_frames, fps=4)
    )
    np.testing.assert_array_equal(video.frames.permute(0, 2, 3, 1).numpy(), own)
    assert (video.metadata.fps, video.metadata.frames_indices) == (metadata.fps, metadata.frames_indices.tolist())
    assert not math.isclose(video.metadata.fps, 30)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.mp4"])
def test_a_start_after_zero_changes_nothing(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, moving(20), 10, codec="libx264", shift=-50)
    with av.open(str(path)) as container:
        assert container.start_time >= 4_900_000
    header = read_video_header(path, MANY)
    assert (header.num_frames, header.fps) == (20, 10)
    np.testing.assert_array_equal(read_video_frames(path, [19], header)[0].permute(1, 2, 0), decoded(path)[19])


def test_packets_of_sound_are_not_counted(tmp_path: Path) -> None:
    path = sound(tmp_path / "a.mkv", frames=moving(12))
    with av.open(str(path)) as container:
        assert {stream.type for stream in container.streams} == {"audio", "video"}
    assert read_video_header(path, MANY).num_frames == len(decoded(path)) == 12


def test_a_title_that_is_not_unicode_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "abcdefgh"
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for pixels in moving(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"ab\xff\xfeefgh"))
    header = read_video_header(path, MANY)
    assert read_video_frames(path, [0, 5], header).shape == (2, 3, 32, 48)


# ---- files that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"), [("a.mp4", {}), ("a.mp4", {"movflags": "+faststart"}), ("a.avi", {}), ("a.mkv", {})]
)
def test_a_cut_file_is_rejected_or_has_all_frames(name: str, options: dict[str, str], tmp_path: Path) -> None:
    whole = write_video(tmp_path / name, moving(60), 10, **options)
    frames, rejected = load_video(part(whole), video_processor=processor_3()).frames, 0
    # What a Matroska file has lost in its last second cannot be known.
    for share in [*range(1, 80, 6), *(() if name == "a.mkv" else range(80, 100, 2))]:
        path = tmp_path / f"cut.{name}"
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size * share // 100])
        try:
            found = load_video(part(path), video_processor=processor_3()).frames
        except VLBridgeError as error:
            rejected += str(error).startswith(f"video: '{path}' ")
        else:
            assert torch.equal(found, frames)
    assert rejected > 13


def test_a_damaged_frame_is_rejected(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.ts", noise, 10, codec="libx264")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    with rejects("is damaged at frame", start=f"video: '{path}' "):
        load_video(part(path), video_processor=processor_3())


def test_a_damaged_number_of_frames_is_rejected(tmp_path: Path) -> None:
    """Without sampling, a list of so many indices would not fit into memory."""
    path = write_video(tmp_path / "a.avi", moving(6))
    data = bytearray(path.read_bytes())
    place = data.index(b"strh") + 8 + 32  # its name and size, then dwLength of the stream header
    assert struct.unpack_from("<I", data, place) == (6,)
    struct.pack_into("<I", data, place, 2**31 - 1)
    path.write_bytes(data)
    with rejects(f"is damaged: {2**31 - 1} frames", f"{len(data)} bytes", start=f"video: '{path}' "):
        read_video_header(path, MANY)


def test_a_file_without_a_frame_rate_is_rejected(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", moving(1), 10, codec="libx264")
    with rejects("has no frame rate", start=f"video: '{path}' "):
        read_video_header(path, MANY)


def text_file(path: Path) -> Path:
    path.write_text("hello " * 1000)
    return path


def image_file(path: Path) -> Path:
    Image.new("RGB", (48, 32)).save(path)
    return path


def playlist(path: Path) -> Path:
    write_video(path.with_name("b.ts"), moving(20))
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nb.ts\n#EXT-X-ENDLIST\n")
    return path


def sound(path: Path, *, cover: bool = False, frames: Sequence[np.ndarray] = ()) -> Path:
    """A file of one second of sound, with a cover image or with frames."""
    Image.new("RGB", (16, 16)).save(path.with_name("cover.jpg"))
    with av.open(str(path), "w") as container, av.open(str(path.with_name("cover.jpg"))) as image:
        stream: Any = container.add_stream("aac", rate=8000)
        if len(frames):
            video: Any = container.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
            for pixels in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(video.encode(None))
        if cover:
            attached: Any = container.add_stream_from_template(image.streams.video[0])
            attached.disposition = av.stream.Disposition.attached_pic
            packet = next(image.demux(video=0))
            packet.stream = attached
            container.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


OTHERS: dict[str, tuple[str, Any, str]] = {
    "empty": ("a.mp4", lambda path: path.write_bytes(b""), "cannot be decoded as a video of the formats mov, mp4"),
    "text": ("a.txt", text_file, "cannot be decoded as a video"),
    "image": ("a.png", image_file, "cannot be decoded as a video"),
    "playlist": ("a.m3u8", playlist, "cannot be decoded as a video"),
    "sound": ("a.mp4", sound, "has no video stream"),
    "sound with a cover": ("a.mp4", partial(sound, cover=True), "has no video stream"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_not_a_video_is_rejected(name: str, tmp_path: Path) -> None:
    file_name, make, problem = OTHERS[name]
    path = tmp_path / file_name
    make(path)
    with rejects(problem, start=f"video: '{path}' "):
        read_video_header(path, MANY)


def test_a_missing_file_and_a_name_like_a_protocol_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in (tmp_path / "b.mp4", tmp_path):
        with rejects(f"video: no file '{missing}'"):
            read_video_header(missing, MANY)
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", moving(4))
    with rejects("cannot be read: File name too long", start="video: 'xxx"):
        read_video_header("x" * 300 + ".mp4", MANY)
    with rejects("video: no file 'concat:a.mp4'"):
        read_video_header("concat:a.mp4", MANY)
    Path("a.mp4").rename("concat:a.mp4")
    assert read_video_header("concat:a.mp4", MANY).num_frames == 4


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", moving(4))
    monkeypatch.setitem(sys.modules, "av", None)
    with rejects(f"video: '{path}': video files need PyAV", "megatron-vlbridge[video]"):
        read_video_header(path, MANY)


def test_frames_above_the_limit_are_rejected_before_decoding(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(8))
    assert len(load_video(part(path), MediaOptions(48 * 32), processor_3()).frames) == 4
    with rejects("has frames of 48 x 32", "1535 pixels (max_image_pixels)", start=f"video: '{path}' "):
        load_video(part(path), MediaOptions(48 * 32 - 1), processor_3())


def test_a_file_of_one_frame_is_rejected(qwen3: Qwen3VLProcessor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(1))
    with rejects("message 0 (user), part 0", "expected at least 2 frames", "found 1"):
        encode_conversation(talk(part(path)), qwen3)


def test_a_process_that_is_forked_after_a_read_can_read(tmp_path: Path) -> None:
    """As the workers of a DataLoader after a look at the data."""
    path = write_video(tmp_path / "a.mp4", moving(8), fps=4)
    header = read_video_header(path, 10**8)
    expected = read_video_frames(path, [0, 7], header)
    with limit(60), multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(pool.apply(read_video_frames, (path, [0, 7], header)), expected)


def test_frames_that_change_their_size_are_rejected(tmp_path: Path) -> None:
    small = write_video(tmp_path / "a.ts", moving(30), 10, codec="mpeg2video")
    large = write_video(tmp_path / "b.ts", moving(30, 64, 48), 10, codec="mpeg2video")
    path = tmp_path / "c.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with rejects("changes at frame", "(48, 32, 0)", "(64, 48, 0)", start=f"video: '{path}' "):
        read_video_frames(path, [0, 58], read_video_header(path, MANY))
