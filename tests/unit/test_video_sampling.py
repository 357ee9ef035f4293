"""Of a video file the frames, timestamps and pixels are those that transformers takes of the same file."""

import itertools
import json
import math
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata
from transformers.video_utils import load_video as reference_load_video

from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.conversations import read_conversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.media import Video, load_video, media_grid, media_shape, placeholder_text
from megatron_vlbridge.data.video_files import read_video_header
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.errors import rejects
from tests.video_writer import COUNTED_BY_PACKETS, FILES, decoded, moving, video_file, write_video

MANY = 10**9
PATCHES: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "cap_pixels_per_frame": False}
PATCHES["size"] = {"shortest_edge": 64, "longest_edge": 64 * 400}
ONE = 1 << 16


def processor_25(**settings: Any) -> Qwen2VLVideoProcessor:
    return Qwen2VLVideoProcessor(**PATCHES | {"fps": 2, "do_sample_frames": True} | settings)


def processor_3(**settings: Any) -> Qwen3VLVideoProcessor:
    return Qwen3VLVideoProcessor(**PATCHES | settings)


FAMILIES = {"qwen2_5_vl": processor_25, "qwen3_vl": processor_3}


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


def same(found: Any, expected: Any, *names: str) -> None:
    for name in names:
        assert torch.equal(found[name], expected[name]), name


# ---- the frames that are taken --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_sampled_as_by_transformers(family: str, name: str, tmp_path: Path) -> None:
    """Twice: transformers samples all decoded frames, and its own loading samples the file."""
    path, processor = video_file(name, tmp_path), FAMILIES[family]()
    video = load_video(part(path), video_processor=processor)
    found = processor([video.frames], video_metadata=[video.metadata], do_sample_frames=False, return_tensors="pt")
    frames, header = decoded(path), read_video_header(path, MANY)
    metadata = VideoMetadata(total_num_frames=len(frames), fps=header.fps)
    expected = processor([frames], video_metadata=[metadata], return_metadata=True, return_tensors="pt")
    [taken] = expected["video_metadata"]
    assert video.metadata.frames_indices == list(taken.frames_indices)
    assert (video.metadata.fps, video.metadata.total_num_frames) == (taken.fps, taken.total_num_frames)
    assert video.metadata.duration == len(frames) / header.fps
    same(found, expected, "pixel_values_videos", "video_grid_thw")
    if name not in COUNTED_BY_PACKETS:
        own, own_metadata = reference_load_video(
            str(path), backend="pyav", sample_indices_fn=partial(processor.sample_frames, fps=processor.fps)
        )
        np.testing.assert_array_equal(video.frames.permute(0, 2, 3, 1).numpy(), own)
        assert video.metadata.timestamps == [index / own_metadata.fps for index in own_metadata.frames_indices.tolist()]


def encoded_by_transformers(qwen3: Qwen3VLProcessor, frames: np.ndarray, fps: float) -> Any:
    text = "<|im_start|>user\n<|video_pad|>hello<|im_end|>\n<|im_start|>assistant\nseven<|im_end|>\n"
    metadata = VideoMetadata(total_num_frames=len(frames), fps=fps)
    return qwen3(text=[text], videos=[frames], video_metadata=[metadata], return_tensors="pt")


def same_sample(sample: Sample, expected: Any) -> None:
    assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert sample.video_grid_thw.tolist() == expected["video_grid_thw"].tolist()
    assert torch.equal(sample.pixel_values_videos, expected["pixel_values_videos"])


@pytest.mark.parametrize("name", FILES)
def test_a_conversation_with_a_file_has_the_tokens_of_transformers(
    name: str, qwen3: Qwen3VLProcessor, tmp_path: Path
) -> None:
    path = video_file(name, tmp_path)
    expected = encoded_by_transformers(qwen3, decoded(path), read_video_header(path, MANY).fps)
    same_sample(encode_conversation(talk(part(path)), qwen3), expected)


def test_a_rotated_file_has_the_grid_of_its_upright_frames(qwen3: Qwen3VLProcessor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(8), 2, matrix=[0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30])
    expected = encoded_by_transformers(qwen3, np.rot90(decoded(path), 1, (1, 2)).copy(), 2.0)
    same_sample(encode_conversation(talk(part(path)), qwen3), expected)


def test_a_line_of_a_file_names_a_video_beside_it(qwen3: Qwen3VLProcessor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(20), 10)
    lines = [json.dumps({"messages": talk(part(name, fps=1))}) for name in ("a.mp4", "b.mp4")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    first, second = read_conversations(tmp_path / "train.jsonl")
    found, expected = encode_conversation(first, qwen3), encode_conversation(talk(part(path, fps=1)), qwen3)
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.pixel_values_videos, expected.pixel_values_videos)
    with rejects(f"message 0 (user), part 0: video: no file '{tmp_path / 'b.mp4'}'"):
        encode_conversation(second, qwen3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_that_of_a_processor_with_these_settings(family: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(60), 20)
    frames, make = decoded(path), FAMILIES[family]
    counts = set()
    for fps, least, most in itertools.product((None, 0.5, 1, 7.5, 40), (None, 2, 8), (None, 3, 9, 12)):
        settings = {"fps": fps, "min_frames": least, "max_frames": most}
        given = {name: value for name, value in settings.items() if value is not None}
        if least == 8 and most == 3:
            with rejects("min_frames up to max_frames, found 8 and 3"):
                load_video(part(path, **given), video_processor=make())
            continue
        metadata = VideoMetadata(total_num_frames=60, fps=20.0)
        expected = make(**given)([frames], video_metadata=[metadata], return_metadata=True, return_tensors="pt")
        indices = list(expected["video_metadata"][0].frames_indices)
        assert load_video(part(path, **given), video_processor=make()).metadata.frames_indices == indices
        options = MediaOptions(**{f"video_{name}": value for name, value in given.items()})
        assert load_video(part(path), options, make()).metadata.frames_indices == indices
        others = MediaOptions(**{f"video_{name}": 3 for name in given})
        assert load_video(part(path, **given), others, make()).metadata.frames_indices == indices
        counts.add(len(indices))
    assert len(counts) > 5


def test_a_frame_that_is_sampled_twice_is_there_twice(tmp_path: Path) -> None:
    path, processor = write_video(tmp_path / "a.mp4", moving(3), 10), processor_3(fps=None, num_frames=6)
    video = load_video(part(path), video_processor=processor)
    assert video.metadata.frames_indices == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(video.frames.permute(0, 2, 3, 1).numpy(), decoded(path)[[0, 0, 1, 1, 2, 2]])


def test_a_processor_that_does_not_sample_takes_all_frames_unless_asked(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(20), 10)
    processor = processor_25(do_sample_frames=False)
    assert len(load_video(part(path), video_processor=processor).frames) == 20
    assert len(load_video(part(path, fps=3), video_processor=processor).frames) == 6
    counted = processor_3(fps=None, num_frames=6)
    assert len(load_video(part(path, fps=5), video_processor=counted).frames) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_is_sampled_as_if_the_file_had_no_other_frames(family: str, tmp_path: Path) -> None:
    processor, rate = FAMILIES[family](), Fraction(25, 2)
    path = write_video(tmp_path / "a.mp4", moving(60), rate)
    frames, empty = decoded(path), 0
    for start, end in itertools.product((None, 0, 0.08, 1, 2.41, 4.7), (None, 0.1, 0.2, 1.6, 4.72, 1e308)):
        keys = {name: time for name, time in (("video_start", start), ("video_end", end)) if time is not None}
        inside = [k for k in range(60) if (start or 0) <= k / 12.5 <= (1e308 if end is None else end)]
        if len(inside) < 2:
            with rejects(start="video: expected "):
                load_video(part(path, **keys), video_processor=processor)
            empty += not inside
            continue
        metadata = VideoMetadata(total_num_frames=len(inside), fps=12.5)
        expected = processor([frames[inside]], video_metadata=[metadata], return_metadata=True, return_tensors="pt")
        video = load_video(part(path, **keys), video_processor=processor)
        taken = [inside[index] for index in expected["video_metadata"][0].frames_indices]
        assert video.metadata.frames_indices == taken  # of the file, so timestamps count from its start
        np.testing.assert_array_equal(video.frames.permute(0, 2, 3, 1).numpy(), frames[taken])
        assert video.metadata.total_num_frames == len(inside)
        assert video.metadata.sampled_fps == expected["video_metadata"][0].sampled_fps
    assert empty


def test_frames_as_a_list_are_all_used_with_their_own_rate(qwen3: Qwen3VLProcessor) -> None:
    frames = torch.from_numpy(moving(9)).permute(0, 3, 1, 2)
    video = load_video({"type": "video", "video": frames, "fps": 3}, MediaOptions(video_fps=1, video_max_frames=4))
    assert (len(video.frames), video.metadata.fps) == (9, 3)
    assert (video.metadata.total_num_frames, video.metadata.duration) == (9, 3)
    for name in ("min_frames", "max_frames", "video_start", "video_end"):
        with rejects(f"video: '{name}' is for video files"):
            load_video({"type": "video", "video": frames, "fps": 3, name: 2})


INVALID: list[tuple[dict[str, Any], str]] = [
    *(({"fps": value}, "a positive number under 'fps'") for value in (0, -1, math.nan, math.inf, "2", True, None)),
    *(
        ({name: value}, f"a positive integer under '{name}'")
        for name in ("min_frames", "max_frames")
        for value in (0, 2.0, True, None)
    ),
    *(
        ({name: value}, f"seconds under '{name}'")
        for name in ("video_start", "video_end")
        for value in (-1, math.nan, "1", True, None)
    ),
    ({"max_frames": 1, "min_frames": 1}, "expected at least 2 frames"),
    ({"video_start": 1e308}, "found none between 1e+308 and 0.8 s"),
    ({"video_start": 3}, "found none between 3 and 0.8 s of 0.80 s"),
    ({"video_start": 0.5, "video_end": 0.4}, "found none between 0.5 and 0.4"),
]


@pytest.mark.parametrize(("keys", "problem"), INVALID, ids=str)
def test_an_invalid_setting_is_rejected(
    keys: dict[str, Any], problem: str, qwen3: Qwen3VLProcessor, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", moving(8), 10)
    with rejects(problem, start="video: "):
        load_video(part(path, **keys), video_processor=qwen3.video_processor)
    with rejects(problem, start="video: "):
        media_grid(part(path, **keys), qwen3)


# ---- measured from headers ------------------------------------------------------------------------------------------


def test_a_conversation_is_measured_without_decoding(
    qwen3: Qwen3VLProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame_files = [tmp_path / f"{index}.png" for index in range(5)]
    for index, path in enumerate(frame_files):
        Image.fromarray(moving(5)[index]).save(path)
    parts = [
        part(write_video(tmp_path / "a.mp4", moving(40)), fps=5),
        {"type": "image", "image": str(frame_files[0]), "max_pixels": 512},
        part(write_video(tmp_path / "b.mkv", moving(30), 7), video_start=1, max_pixels=9000),
        {"type": "video", "video": [str(path) for path in frame_files], "fps": 3, "total_pixels": 2000},
        {"type": "video", "video": torch.from_numpy(moving(3)).permute(0, 3, 1, 2), "fps": 0.5},
        {"type": "image", "image": Image.fromarray(moving(1)[0])},
    ]
    sample = encode_conversation(talk(*parts), qwen3)
    for name in ("megatron_vlbridge.data.media.read_video_frames", "megatron_vlbridge.data.media.read_image"):
        monkeypatch.setattr(name, None)
    shapes = [media_shape(one, qwen3) for one in parts]
    for kind, grids in (("image", sample.image_grid_thw), ("video", sample.video_grid_thw)):
        assert [
            list(shape.grid) for shape, one in zip(shapes, parts, strict=True) if one["type"] == kind
        ] == grids.tolist()
    assert [media_grid(one, qwen3) for one in parts] == [shape.grid for shape in shapes]
    texts = [placeholder_text(one["type"], shape, qwen3) for one, shape in zip(parts, shapes, strict=True)]
    around = {"image": "<|vision_start|>{}<|vision_end|>", "video": "{}"}
    content = "".join(around[one["type"]].format(text) for one, text in zip(parts, texts, strict=True))
    text = f"<|im_start|>user\n{content}hello<|im_end|>\n<|im_start|>assistant\nseven<|im_end|>\n"
    assert qwen3.tokenizer(text)["input_ids"] == sample.input_ids.tolist()


def test_a_video_of_qwen2_5_has_no_timestamps(qwen3: Qwen3VLProcessor, tmp_path: Path) -> None:
    processor = Qwen2_5_VLProcessor(qwen3.image_processor, qwen3.tokenizer, processor_25(), qwen3.chat_template)
    path = write_video(tmp_path / "a.mp4", moving(40), 10)
    metadata = VideoMetadata(total_num_frames=40, fps=10.0)
    expected = processor(text=["<|video_pad|>hello"], videos=[decoded(path)], video_metadata=[metadata])
    shape = media_shape(part(path), processor)
    assert shape.timestamps == []
    text = placeholder_text("video", shape, processor) + "hello"
    assert processor.tokenizer(text)["input_ids"] == expected["input_ids"][0]


def test_nothing_of_a_video_is_kept(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(12))
    first: Video = load_video(part(path), video_processor=processor_3())
    assert torch.equal(first.frames, load_video(part(path), video_processor=processor_3()).frames)
    write_video(path, moving(12, seed=1))
    assert not torch.equal(first.frames, load_video(part(path), video_processor=processor_3()).frames)
