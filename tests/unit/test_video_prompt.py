"""The tokens of a video have the format that the model was trained with, for every version of transformers."""

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLModel, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.video_prompt import without_outer_pair
from megatron_vlbridge.demo.tiny_processor import build_processor
from megatron_vlbridge.layout.positions import mrope_positions

START, IMAGE_PAD, VIDEO, END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"
PATCH, MERGE = 4, 2


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    return build_processor(["seven"], patch_size=PATCH, merge_size=MERGE, min_pixels=64, max_pixels=64 * 24)


def frames(count: int, width: int, height: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def video_part(count: int, fps: float, width: int = 24, height: int = 16) -> dict[str, Any]:
    return {"type": "video", "video": frames(count, width, height), "fps": fps}


def talk(*parts: dict[str, Any] | str) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "seven"}]


def block(part: dict[str, Any]) -> str:
    """A video as text: for every two frames their mean timestamp, and placeholders between start and end tokens."""
    video, fps = part["video"], part["fps"]
    _, _, height, width = video.shape
    last = len(video) - 1
    # The last frame of an odd count is repeated.
    times = [(first + min(first + 1, last)) / 2 / fps for first in range(0, len(video), 2)]
    tokens = (height // PATCH // MERGE) * (width // PATCH // MERGE)
    return "".join(f"<{time:.1f} seconds>{START}{VIDEO * tokens}{END}" for time in times)


def turns(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\nseven<|im_end|>\n"


@pytest.mark.parametrize("fps", [0.3, 1, 2, 7.5, 23.976, 24, 30, 59.94, 240])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_every_two_frames_of_a_video_have_one_timestamp_and_vision_start_and_end(
    processor: Qwen3VLProcessor, count: int, fps: float
) -> None:
    part = video_part(count, fps)
    sample = encode_conversation(talk("What", part, "is it"), processor)
    expected = processor.tokenizer(turns(f"What{block(part)}is it"))["input_ids"]
    assert sample.input_ids.tolist() == expected


def test_images_next_to_videos_keep_vision_start_and_end(processor: Qwen3VLProcessor) -> None:
    image = {"type": "image", "image": Image.new("RGB", (16, 16))}
    videos = [video_part(4, 2), video_part(3, 2, 16, 24)]
    sample = encode_conversation(talk(videos[0], image, videos[1], videos[0]), processor)
    content = f"{block(videos[0])}{START}{IMAGE_PAD * 4}{END}{block(videos[1])}{block(videos[0])}"
    assert sample.input_ids.tolist() == processor.tokenizer(turns(content))["input_ids"]


def test_a_template_with_only_the_placeholder_gives_the_same_tokens(processor: Qwen3VLProcessor) -> None:
    bare = build_processor(["seven"], patch_size=PATCH, merge_size=MERGE, min_pixels=64, max_pixels=64 * 24)
    bare.chat_template = processor.chat_template.replace(f"{START}{VIDEO}{END}", VIDEO)
    assert bare.chat_template != processor.chat_template
    messages = talk(video_part(5, 2), "What is it")
    first, second = (encode_conversation(messages, which).input_ids for which in (processor, bare))
    assert torch.equal(first, second)


def test_the_same_prompt_at_inference(processor: Qwen3VLProcessor) -> None:
    """The lines of docs/training.md."""
    part = video_part(5, 2)
    messages = talk(part, "What is it")
    text = processor.apply_chat_template(messages, tokenize=False)
    text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    assert text == without_outer_pair(processor.apply_chat_template(messages, tokenize=False), processor)
    metadata = VideoMetadata(total_num_frames=5, fps=2, frames_indices=list(range(5)))
    inputs = processor(
        text=[text], videos=[part["video"]], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    sample = encode_conversation(messages, processor)
    assert torch.equal(inputs["input_ids"][0], sample.input_ids)
    assert torch.equal(inputs["pixel_values_videos"], sample.pixel_values_videos)


def positions(sample: Sample, processor: Qwen3VLProcessor) -> torch.Tensor:
    return mrope_positions(
        sample.input_ids,
        [len(sample.input_ids)],
        sample.image_grid_thw,
        sample.video_grid_thw,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        merge_size=MERGE,
    )


def test_positions_of_these_tokens_equal_those_of_transformers(processor: Qwen3VLProcessor) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16}
    config = Qwen3VLConfig(
        text_config={
            **small,
            "vocab_size": 400,
            "num_hidden_layers": 1,
            "head_dim": 16,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
        },
        vision_config={
            **small,
            "depth": 1,
            "num_heads": 1,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
    )
    reference = Qwen3VLModel(config)
    for count, width, height in ((2, 24, 16), (5, 16, 40), (8, 8, 8)):
        sample = encode_conversation(talk("What", video_part(count, 2, width, height), "is it"), processor)
        ids = sample.input_ids[None]
        kinds = 2 * (ids == processor.video_token_id).int()
        expected = reference.get_rope_index(ids, kinds, None, sample.video_grid_thw)[0][:, 0]
        assert torch.equal(positions(sample, processor), expected)
