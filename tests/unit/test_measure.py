"""What is measured from the headers of media files is what encoding gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLProcessor

from megatron_vlbridge.data import images
from megatron_vlbridge.data.chat import Sample, encode_conversation, measure_conversation
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.lengths import measure
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.cases import later
from tests.errors import rejects
from tests.video_writer import write_video

WORDS = ["hello", "seven", "\n", "<think>", "é", "1.5 seconds"]


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    return build_processor(["hello", "seven"], patch_size=4, merge_size=2, min_pixels=128, max_pixels=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 40 sizes, some of them rotated by EXIF, and two videos."""
    where, random = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for index in range(40):
        pixels = random.integers(0, 256, (*random.integers(8, 90, 2), 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + index % 8
        Image.fromarray(pixels).save(where / f"{index}.jpg", exif=exif)
    for index, rate in enumerate((10, 24)):
        write_video(where / f"{index}.mp4", random.integers(0, 256, (17 + 9 * index, 32, 48, 3), dtype=np.uint8), rate)
    return where


def conversation(folder: Path, seed: int) -> list[dict[str, Any]]:
    """One to three questions with texts, images, lists of frames and videos in any order, some with own limits."""
    random = np.random.default_rng(seed)

    def part() -> dict[str, Any]:
        kind = random.choice(["text", "text", "image", "image", "frames", "video"])
        limits = {"max_pixels": int(random.integers(200, 900))} if random.random() < 0.3 else {}
        if kind == "text":
            return {"type": "text", "text": " ".join(random.choice(WORDS, 3))}
        if kind == "image":
            return {"type": "image", "image": str(folder / f"{random.integers(40)}.jpg")} | limits
        if kind == "video":
            return {"type": "video", "video": str(folder / f"{random.integers(2)}.mp4"), "fps": 2.0} | limits
        size = tuple(int(side) for side in random.integers(8, 60, 2))
        frames = [Image.new("RGB", size, (index, 9, 9)) for index in range(int(random.integers(2, 6)))]
        return {"type": "video", "video": frames, "fps": 1.5}

    messages = []
    for _ in range(random.integers(1, 4)):
        messages.append({"role": "user", "content": [part() for _ in range(random.integers(1, 5))]})
        messages.append({"role": "assistant", "content": " ".join(random.choice(WORDS, 2))})
    return messages


def check_same(messages: list[dict[str, Any]], processor: Qwen3VLProcessor, media: MediaOptions) -> Sample:
    sample = encode_conversation(messages, processor, media=media, allow_no_loss=True)
    measured = measure_conversation(messages, processor, media=media, allow_no_loss=True)
    for name in ("input_ids", "loss_mask", "image_grid_thw", "video_grid_thw"):
        found, expected = getattr(measured, name), getattr(sample, name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name
    assert (measured.excluded_turns, measured.skipped_turns) == (sample.excluded_turns, sample.skipped_turns)
    return sample


@pytest.mark.parametrize("count", [60, later(1500)])
def test_random_conversations_are_measured_as_they_are_encoded(
    processor: Qwen3VLProcessor, folder: Path, count: int
) -> None:
    samples = [check_same(conversation(folder, seed), processor, MediaOptions()) for seed in range(count)]
    assert sum(len(sample.image_grid_thw) for sample in samples) > count
    assert sum(len(sample.video_grid_thw) for sample in samples) > count / 2
    assert len({tuple(grid) for sample in samples for grid in sample.image_grid_thw.tolist()}) > 20


def test_no_pixel_is_decoded(processor: Qwen3VLProcessor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": str(folder / "3.jpg")}]},
        {"role": "assistant", "content": "seven"},
    ]

    decoded: list[object] = []
    own = images._to_rgb
    monkeypatch.setattr(images, "_to_rgb", lambda *arguments: decoded.append(arguments) or own(*arguments))
    assert len(measure_conversation(messages, processor).image_grid_thw) == 1
    assert not decoded
    encode_conversation(messages, processor)
    assert len(decoded) == 1


def test_a_missing_image_and_an_answer_without_loss_are_refused(processor: Qwen3VLProcessor) -> None:
    question: dict[str, Any] = {"role": "user", "content": [{"type": "image", "image": "none.jpg"}]}
    with rejects("message 0 (user), part 0", "none.jpg"):
        measure_conversation([question, {"role": "assistant", "content": "x"}], processor)
    with rejects("no supervised token"):
        measure_conversation([{"role": "user", "content": "hello"}], processor)


def test_torch_has_one_thread_while_conversations_are_measured(
    processor: Qwen3VLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two processes of two threads on two cores, the same work took eight times as long."""
    threads = []

    def measured(*_: Any, **__: Any) -> None:
        threads.append(torch.get_num_threads())
        raise OSError("stop")

    monkeypatch.setattr(measure, "measure_conversation", measured)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(OSError, match="stop"):
            measure.Measure(processor, 64)([[]], range(1))
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
