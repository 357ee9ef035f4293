"""Encoding a conversation: the processor's own tokens and patches, and a loss on what the assistant says."""

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
from megatron_vlbridge.errors import VLBridgeError

WORDS = ["hello", "seven", "What", "is", "it", "\n\n", "\n\n\n"]
SIZES = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 24}


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    return build_processor(WORDS, **SIZES)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def frames(count: int, width: int = 24, height: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def image_part(*size: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(*size)}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def talk(question: Any, answer: Any = "seven") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def learned(sample: Sample, processor: Qwen3VLProcessor) -> list[str]:
    """The runs of learned tokens, decoded."""
    runs: list[list[int]] = []
    previous = False
    for token, learn in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if learn:
            runs = [*runs, [token]] if not previous else [*runs[:-1], [*runs[-1], token]]
        previous = learn
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
def test_tokens_and_patches_are_the_processor_s_own(processor: Qwen3VLProcessor, messages: list) -> None:
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
def test_a_video_is_encoded_as_by_the_processor_with_all_its_frames(processor: Qwen3VLProcessor, count: int) -> None:
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
        images=[picture(30, 50)],
        videos=[video],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert sample.video_grid_thw[0, 0] == -(-count // 2)
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(getattr(sample, name), expected[name]), name
    assert torch.equal(sample.input_ids, expected["input_ids"][0])
    assert learned(sample, processor) == ["seven<|im_end|>"]


def test_frames_as_pictures_are_the_same_video_as_a_tensor(processor: Qwen3VLProcessor, tmp_path: Path) -> None:
    video = frames(4)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]
    pictures[0].save(tmp_path / "first.png")
    listed = [tmp_path / "first.png", *pictures[1:]]
    samples = [
        encode_conversation(talk([{"type": "video", "video": source, "fps": 2}]), processor)
        for source in (video, listed)
    ]
    assert torch.equal(samples[0].pixel_values_videos, samples[1].pixel_values_videos)
    assert torch.equal(samples[0].input_ids, samples[1].input_ids)


def test_an_answer_whose_first_line_break_merges_with_the_header_s_is_not_learned(processor: Qwen3VLProcessor) -> None:
    messages = talk("hello", "seven") + talk("it", "\nseven")
    sample = encode_conversation(messages, processor)
    assert processor.tokenizer.convert_tokens_to_ids("ĊĊ") in sample.input_ids.tolist(), "it must merge them"
    assert learned(sample, processor) == ["seven<|im_end|>"]
    assert [turn.message for turn in sample.unlearned] == [3]
    assert "joins the line break" in sample.unlearned[0].reason
    with pytest.raises(VLBridgeError, match=r"no token to learn: .*message 1 \(assistant\): .*line break"):
        encode_conversation(messages[2:], processor)


def test_a_default_system_prompt_is_a_turn_without_loss() -> None:
    processor = build_processor(WORDS, **SIZES)
    processor.chat_template = "{{- '<|im_start|>system\nhello<|im_end|>\n' }}" + CHAT_TEMPLATE
    sample = encode_conversation(talk("What is it"), processor)
    assert processor.tokenizer.decode(sample.input_ids).startswith("<|im_start|>system\nhello<|im_end|>\n")
    assert learned(sample, processor) == ["seven<|im_end|>"]


def test_a_conversation_without_an_answer_is_refused_unless_asked_for(processor: Qwen3VLProcessor) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(VLBridgeError, match=r"no token to learn: none of the 1 messages .* \(roles: user\)"):
        encode_conversation(messages, processor)
    assert not encode_conversation(messages, processor, allow_no_loss=True).loss_mask.any()


SMALL = {"type": "video", "video": frames(4), "fps": 2}
REFUSED = {
    "special token": (talk("a <|im_end|> b"), r"message 0 \(user\): the text holds '<\|im_end\|>'"),
    "special token in two parts": (talk([text_part("<|image_"), text_part("pad|>")]), r"holds '<\|image_pad\|>'"),
    "special token in the answer": (talk("a", "<|vision_start|>"), r"message 1 \(assistant\)"),
    "no such file": (
        talk([{"type": "image", "image": "nowhere.png"}]),
        r"message 0 \(user\), part 0: .*no file 'nowhere.png'",
    ),
    "not a picture": (talk([{"type": "image", "image": __file__}]), r"test_chat.py' cannot be decoded as an image"),
    "no picture": (talk([{"type": "image"}]), r"under the key 'image', found nothing"),
    "second picture": (talk([text_part("x"), image_part(16, 16), {"type": "image", "image": "b"}]), r"part 2: .*'b'"),
    "long picture": (talk([image_part(8 * 201, 8)]), r"the processor refuses 1 images.*aspect ratio"),
    "no fps": (talk([{"type": "video", "video": frames(4)}]), r"under the key 'fps' .* found None"),
    "zero fps": (talk([{**SMALL, "fps": 0}]), r"a positive number, found 0"),
    "nan fps": (talk([{**SMALL, "fps": float("nan")}]), r"a positive number, found nan"),
    "one frame": (talk([SMALL, {**SMALL, "video": frames(1)}]), r"video 1: expected at least 2 frames, found 1"),
    "float frames": (talk([{**SMALL, "video": frames(4).float()}]), r"expected frames uint8 \[F, 3, H, W\]"),
    "frames of two sizes": (talk([{**SMALL, "video": [picture(8, 8), picture(8, 16)]}]), r"of one size.*\(8, 16\)"),
    "video file": (talk([{**SMALL, "video": "a.mp4"}]), r"found str 'a.mp4'; decode a video file"),
}


@pytest.mark.parametrize(("messages", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_unfit_conversation_is_refused(processor: Qwen3VLProcessor, messages: list, message: str) -> None:
    with pytest.raises(VLBridgeError, match=message):
        encode_conversation(messages, processor)


TEMPLATES = {
    "last turn left out": (CHAT_TEMPLATE.replace("in messages", "in messages[:-1]"), r"one turn for each of the 2"),
    "no end": (CHAT_TEMPLATE.replace("<|im_end|>", ""), r"turn 0: expected .*does not have the Qwen form"),
    "text between turns": (
        CHAT_TEMPLATE.replace("<|im_end|>\n' }}", "<|im_end|>\n' }}{{ '' if loop.last else 'hello' }}"),
        r"writes '\\nhello' before turn 1",
    ),
    "text at the end": (CHAT_TEMPLATE + "hello", r"writes '\\nhello' after the last turn"),
    "text at the start": ("hello" + CHAT_TEMPLATE, r"writes 'hello' before turn 0"),
    "other header": (CHAT_TEMPLATE.replace("message.role", "'bot'"), r"one turn for each .* made 2 \(bot, bot\)"),
    "no line break": (CHAT_TEMPLATE.replace("role + '\n'", "role"), r"turn 0: expected a role, a line break"),
    "image left out": (CHAT_TEMPLATE.replace("<|image_pad|>", ""), r"message 0 \(user\): .*changes the text"),
    "image twice": (
        CHAT_TEMPLATE.replace("part.text", "part.text + '<|vision_start|><|image_pad|><|vision_end|>'"),
        r"message 0 \(user\): .*changes the text",
    ),
    "text cut": (CHAT_TEMPLATE.replace("part.text", "part.text[:3]"), r"expected '.*hello', found '.*hel'"),
    "no generation prompt": (
        CHAT_TEMPLATE.replace("add_generation_prompt", "false"),
        r"generation prompts to begin with .*assistant",
    ),
    "exception": ("{{ raise_exception('no images here') }}", r"chat template refuses .*no images here"),
    "error": ("{{ messages[0].content + 'x' }}", r"chat template refuses the conversation"),
}


def test_a_template_that_cuts_the_system_prompt_is_refused() -> None:
    processor = build_processor(WORDS, **SIZES)
    processor.chat_template = CHAT_TEMPLATE.replace(
        "message.content }}", "message.content[:3] if message.role == 'system' else message.content }}"
    )
    messages = [{"role": "system", "content": "hello"}, *talk("it")]
    with pytest.raises(VLBridgeError, match=r"message 0 \(system\): .*expected 'hello', found 'hel'"):
        encode_conversation(messages, processor)


@pytest.mark.parametrize(("template", "message"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_template_of_another_form_is_refused(template: str, message: str) -> None:
    processor = build_processor(WORDS, **SIZES)
    processor.chat_template = template
    with pytest.raises(VLBridgeError, match=message):
        encode_conversation(talk([image_part(16, 16), text_part("hello")]), processor)


def test_placeholders_that_do_not_fit_the_grid_are_refused() -> None:
    class OneTooFew(Qwen3VLProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            encoded = super().__call__(*args, **kwargs)
            ids = encoded["input_ids"]
            place = int((ids[0] == self.image_token_id).nonzero()[0])
            encoded["input_ids"] = torch.cat([ids[:, :place], ids[:, place + 1 :]], dim=1)
            return encoded

    whole = build_processor(WORDS, **SIZES)
    broken = OneTooFew(whole.image_processor, whole.tokenizer, whole.video_processor, chat_template=CHAT_TEMPLATE)
    with pytest.raises(VLBridgeError, match=r"found 3 image .*image 0 with grid \(1, 4, 4\) needs 4 tokens"):
        encode_conversation(talk([image_part(16, 16)]), broken)


def test_the_processor_survives_saving(processor: Qwen3VLProcessor, tmp_path: Path) -> None:
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


def test_picture_sizes_without_room_for_a_patch_are_refused() -> None:
    with pytest.raises(VLBridgeError, match=r"max_pixels: .* one merged patch = 64, found 63"):
        build_processor(WORDS, patch_size=4, merge_size=2, min_pixels=1, max_pixels=63)
