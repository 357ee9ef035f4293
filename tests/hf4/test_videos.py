"""Videos: the same tokens and patches with transformers 4.57, with which Qwen3-VL was released, and the newest."""

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

from megatron_vlbridge.demo.tiny_processor import CHAT_TEMPLATE, TEMPORAL_PATCH_SIZE, VISION_TOKENS
from tests.hf4.videos import CLIPS, KEYS, SIZES, encoded, processed

ROOT = Path(__file__).parents[2]
type Clips = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and the clips as encoded with it by the newest transformers."""
    folder = tmp_path_factory.mktemp("newest")
    subprocess.run([ROOT / ".venv/bin/python", "-m", "tests.hf4.videos", folder], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def newest(saved: Path) -> dict[str, Clips]:
    return torch.load(saved / "clips.pt")


@pytest.fixture(scope="module")
def released(saved: Path) -> Qwen3VLProcessor:
    """The processor of 4.57, which `build_processor` cannot make, as it wants a tokenizer class of its own."""
    tokenizer = Qwen2TokenizerFast(
        tokenizer_file=str(saved / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *VISION_TOKENS],
    )
    sizes = {
        "patch_size": SIZES["patch_size"],
        "merge_size": SIZES["merge_size"],
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=Qwen3VLVideoProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 64 * 24 * 16}),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def assert_same(found: Clips, expected: Clips) -> None:
    assert len(found) == len(expected) == len(CLIPS)
    for clip, other in zip(found, expected, strict=True):
        for key in KEYS:
            assert torch.equal(clip[key], other[key]), key


def test_both_encode_videos_as_the_processor_of_4_57_alone(released: Qwen3VLProcessor, newest: dict) -> None:
    expected = processed(released)
    assert_same(encoded(released), expected)
    assert_same(newest["encoded"], expected)


def test_the_newest_processor_alone_leaves_two_tokens_more(released: Qwen3VLProcessor, newest: dict) -> None:
    """The difference that `without_outer_pair` removes: drop it, and this test, when transformers builds the same."""
    for alone, ours in zip(newest["processed"], newest["encoded"], strict=True):
        assert len(alone["input_ids"]) == len(ours["input_ids"]) + 2
