"""An encoded conversation has the tokens and patches of the processor, and a loss on the assistant content."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.demo.tiny_processor import CHAT_TEMPLATE, build_processor
from tests.errors import rejects

WORDS = ["hello", "seven", "What", "is", "it", "\n\n", "\n\n\n"]
SIZES = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 24}


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    return build_processor(WORDS, **SIZES)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def frames(count: int, width: int = 24, height: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def image_part(*size: int) -> dict[str, Any]:
    return {"type": "image", "image": random_image(*size)}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def talk(question: Any, answer: Any = "seven") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def supervised(sample: Sample, processor: Qwen3VLProcessor) -> list[str]:
    """The runs of supervised tokens, decoded."""
    runs: list[list[int]] = []
    previous = False
    for token, has_loss in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if has_loss:
            runs = [*runs, [token]] if not previous else [*runs[:-1], [*runs[-1], token]]
        previous = has_loss
    return [processor.tokenizer.decode(run) for run in runs]


CONVERSATIONS = {
    "text": talk("hello"),
    "text parts": talk([text_part("What is"), text_part(" it")], [text_part("se"), text_part("ven")]),
    "system": [{"role": "system", "content": "hello"}, *talk("What is it")],
    "one image": talk([image_part(30, 50), text_part("What is it")]),
    "images of several sizes": talk([image_part(16, 16), image_part(80, 8), text_part("it"), image_part(33, 41)]),
    "halves of a token around an image": talk([text_part("<|image_"), image_part(16, 16), text_part("pad|>")]),
    "images in two turns": talk([image_part(16, 24), text_part("it")]) + talk([text_part("is"), image_part(24, 16)]),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_tokens_and_patches_are_those_of_the_processor(processor: Qwen3VLProcessor, messages: list) -> None:
    sample = encode_conversation(messages, processor)
    expected = processor.apply_chat_template(
        copy.deepcopy(messages), tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(sample.input_ids, expected["input_ids"][0])
    if "pixel_values" in expected:
        assert torch.equal(sample.pixel_values, expected["pixel_values"])
        assert torch.equal(sample.image_grid_thw, expected["image_grid_thw"])
    else:
        assert sample.pixel_values.shape == (0, 96)
        assert sample.image_grid_thw.shape == (0, 3)
    assert sample.pixel_values_videos.shape == (0, 96)
    assert sample.video_grid_thw.shape == (0, 3)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_video_is_encoded_as_by_the_processor_with_all_frames(processor: Qwen3VLProcessor, count: int) -> None:
    video = frames(count)
    parts = [image_part(30, 50), {"type": "video", "video": video, "fps": 4}, text_part("What is it")]
    sample = encode_conversation(talk(parts), processor)
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|video_pad|>"
        "What is it<|im_end|>\n<|im_start|>assistant\nseven<|im_end|>\n"
    )
    metadata = VideoMetadata(total_num_frames=count, fps=4.0, frames_indices=list(range(count)))
    expected = processor(
        text=[text],
        images=[random_image(30, 50)],
        videos=[video],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert sample.video_grid_thw[0, 0] == -(-count // 2)
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(getattr(sample, name), expected[name]), name
    assert torch.equal(sample.input_ids, expected["input_ids"][0])
    assert supervised(sample, processor) == ["seven<|im_end|>"]


def test_frames_as_images_are_the_same_video_as_a_tensor(processor: Qwen3VLProcessor, tmp_path: Path) -> None:
    video = frames(4)
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]
    images[0].save(tmp_path / "first.png")
    listed = [tmp_path / "first.png", *images[1:]]
    samples = [
        encode_conversation(talk([{"type": "video", "video": source, "fps": 2}]), processor)
        for source in (video, listed)
    ]
    assert torch.equal(samples[0].pixel_values_videos, samples[1].pixel_values_videos)
    assert torch.equal(samples[0].input_ids, samples[1].input_ids)


def test_an_answer_whose_leading_newline_merges_with_the_header_is_excluded(processor: Qwen3VLProcessor) -> None:
    messages = talk("hello", "seven") + talk("it", "\nseven")
    sample = encode_conversation(messages, processor)
    assert processor.tokenizer.convert_tokens_to_ids("ĊĊ") in sample.input_ids.tolist(), "the tokenizer must merge them"
    assert supervised(sample, processor) == ["seven<|im_end|>"]
    assert [turn.message for turn in sample.excluded_turns] == [3]
    assert "merges the newline" in sample.excluded_turns[0].reason
    with rejects("no supervised token", "message 1 (assistant)", "merges the newline"):
        encode_conversation(messages[2:], processor)


def test_a_default_system_prompt_is_a_turn_without_loss() -> None:
    processor = build_processor(WORDS, **SIZES)
    processor.chat_template = "{{- '<|im_start|>system\nhello<|im_end|>\n' }}" + CHAT_TEMPLATE
    sample = encode_conversation(talk("What is it"), processor)
    assert processor.tokenizer.decode(sample.input_ids).startswith("<|im_start|>system\nhello<|im_end|>\n")
    assert supervised(sample, processor) == ["seven<|im_end|>"]


def test_a_conversation_without_an_answer_is_rejected_unless_allowed(processor: Qwen3VLProcessor) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with rejects("no supervised token", "(roles: user)"):
        encode_conversation(messages, processor)
    assert not encode_conversation(messages, processor, allow_no_loss=True).loss_mask.any()


SMALL = {"type": "video", "video": frames(4), "fps": 2}
USER = "message 0 (user)"
LONG = torch.zeros(4, 3, 8, 1608, dtype=torch.uint8)
TWO_SIZES = [random_image(8, 8), random_image(8, 16)]
REJECTED = {
    "special token": (talk("a <|im_end|> b"), USER, "special tokens '<|im_end|>'"),
    "special token in two parts": (talk([text_part("<|image_"), text_part("pad|>")]), USER, "'<|image_pad|>'"),
    "special token in the answer": (talk("a", "<|vision_start|>"), "message 1 (assistant)", "'<|vision_start|>'"),
    "no such file": (talk([{"type": "image", "image": "none.png"}]), f"{USER}, part 0", "no file 'none.png'"),
    "not an image": (
        talk([{"type": "image", "image": __file__}]),
        f"{USER}, part 0",
        "test_chat.py' cannot be decoded",
    ),
    "no image": (talk([{"type": "image"}]), f"{USER}, part 0", "under the key 'image', found nothing"),
    "second image": (talk([text_part("x"), image_part(16, 16), {"type": "image", "image": "b"}]), "part 2", "'b'"),
    "long image": (talk([SMALL, image_part(8 * 201, 8)]), f"{USER}, part 1: image: expected an aspect", "1608 x 8"),
    "long video": (
        talk([{**SMALL, "video": torch.zeros(4, 3, 8, 1608, dtype=torch.uint8)}]),
        f"{USER}, part 0: video",
        "1608 x 8",
    ),
    "no fps": (talk([{"type": "video", "video": frames(4)}]), "under the key 'fps'", "found None"),
    "zero fps": (talk([{**SMALL, "fps": 0}]), "under the key 'fps'", "found 0"),
    "nan fps": (talk([{**SMALL, "fps": float("nan")}]), "under the key 'fps'", "found nan"),
    "one frame": (talk([SMALL, {**SMALL, "video": frames(1)}]), f"{USER}, part 1: video: expected at", "found 1"),
    "float frames": (talk([{**SMALL, "video": frames(4).float()}]), "expected frames uint8", "found torch.float32"),
    "frames of two sizes": (talk([{**SMALL, "video": TWO_SIZES}]), "frames of the same size", "(8, 16)"),
    "video file": (talk([{**SMALL, "video": "a.mp4"}]), f"{USER}, part 0", "video: no file 'a.mp4'"),
}


@pytest.mark.parametrize(("messages", "where", "problem"), REJECTED.values(), ids=REJECTED.keys())
def test_an_invalid_conversation_is_rejected(
    processor: Qwen3VLProcessor, messages: list, where: str, problem: str
) -> None:
    with rejects(where, problem):
        encode_conversation(messages, processor)


CHANGED = "message 0 (user): the chat template changes the text"
TEMPLATES = {
    "last turn dropped": (CHAT_TEMPLATE.replace("in messages", "in messages[:-1]"), "one turn for each of the 2"),
    "no end": (CHAT_TEMPLATE.replace("<|im_end|>", ""), "does not have the ChatML format"),
    "text between turns": (
        CHAT_TEMPLATE.replace("<|im_end|>\n' }}", "<|im_end|>\n' }}{{ '' if loop.last else 'hello' }}"),
        r"adds '\nhello' before turn 1",
    ),
    "text at the end": (CHAT_TEMPLATE + "hello", r"adds '\nhello' after the last turn"),
    "text at the start": ("hello" + CHAT_TEMPLATE, "adds 'hello' before turn 0"),
    "other header": (CHAT_TEMPLATE.replace("message.role", "'bot'"), "rendered 2 (bot, bot)"),
    "no newline": (CHAT_TEMPLATE.replace("role + '\n'", "role"), r"turn 0: expected a role, '\n', content"),
    "image dropped": (CHAT_TEMPLATE.replace("<|image_pad|>", ""), CHANGED),
    "image twice": (
        CHAT_TEMPLATE.replace("part.text", "part.text + '<|vision_start|><|image_pad|><|vision_end|>'"),
        CHANGED,
    ),
    "text truncated": (CHAT_TEMPLATE.replace("part.text", "part.text[:3]"), CHANGED),
    "no generation prompt": (CHAT_TEMPLATE.replace("add_generation_prompt", "false"), "generation prompts to begin"),
    "exception": ("{{ raise_exception('no images here') }}", "rejects the conversation: no images here"),
    "error": ("{{ messages[0].content + 'x' }}", "chat template rejects the conversation"),
}


def test_a_template_that_truncates_the_system_prompt_is_rejected() -> None:
    processor = build_processor(WORDS, **SIZES)
    processor.chat_template = CHAT_TEMPLATE.replace(
        "message.content }}", "message.content[:3] if message.role == 'system' else message.content }}"
    )
    messages = [{"role": "system", "content": "hello"}, *talk("it")]
    with rejects("message 0 (system): the chat template changes the text", "expected 'hello', found 'hel'"):
        encode_conversation(messages, processor)


@pytest.mark.parametrize(("template", "problem"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_template_of_another_format_is_rejected(template: str, problem: str) -> None:
    processor = build_processor(WORDS, **SIZES)
    processor.chat_template = template
    with rejects(problem):
        encode_conversation(talk([image_part(16, 16), text_part("hello")]), processor)


def test_placeholders_that_do_not_match_the_grid_are_rejected() -> None:
    class OneTooFew(Qwen3VLProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            encoded = super().__call__(*args, **kwargs)
            ids = encoded["input_ids"]
            first = int((ids[0] == self.image_token_id).nonzero()[0])
            encoded["input_ids"] = torch.cat([ids[:, :first], ids[:, first + 1 :]], dim=1)
            return encoded

    whole = build_processor(WORDS, **SIZES)
    broken = OneTooFew(whole.image_processor, whole.tokenizer, whole.video_processor, chat_template=CHAT_TEMPLATE)
    with rejects("found 3 image", "image 0 with grid (1, 4, 4)"):
        encode_conversation(talk([image_part(16, 16)]), broken)


def test_a_saved_processor_encodes_the_same(processor: Qwen3VLProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is Qwen3VLProcessor
    messages = talk([image_part(30, 50), SMALL, text_part("What is it\n\n")])
    first, second = (encode_conversation(messages, which) for which in (processor, loaded))
    for name in Sample.__dataclass_fields__:
        one, other = getattr(first, name), getattr(second, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


def test_every_word_of_the_processor_is_one_token(processor: Qwen3VLProcessor) -> None:
    for word in WORDS:
        assert len(processor.tokenizer.encode(word)) == 1, word
    for word in WORDS[:5]:
        assert len(processor.tokenizer.encode(f" {word}")) == 1, word
    assert build_processor(WORDS, **SIZES).tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_image_sizes_below_one_merged_patch_are_rejected() -> None:
    with rejects("max_pixels: ", "found 63"):
        build_processor(WORDS, patch_size=4, merge_size=2, min_pixels=1, max_pixels=63)
