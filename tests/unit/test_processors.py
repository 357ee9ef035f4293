"""Conversations are encoded through one interface, with the published processors and with others."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from megatron_vlbridge import read_config
from megatron_vlbridge.data.chat import encode_conversation, measure_conversation
from megatron_vlbridge.data.dataset import check_processor
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.processors.published import as_conversation_processor
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.errors import rejects
from tests.other_processor import TOKENS, PreExpanded
from tests.unit.test_turns import TEMPLATES

SIZE = {"shortest_edge": 128, "longest_edge": 2048}
SETTINGS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": SIZE}


def base() -> Any:
    return build_processor(["hello", "seven"], patch_size=4, merge_size=2, min_pixels=128, max_pixels=2048)


@pytest.fixture(scope="module")
def qwen2_5() -> Qwen2_5_VLProcessor:
    """Its own processor classes and its published template."""
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**SETTINGS),
        base().tokenizer,
        Qwen2VLVideoProcessor(**SETTINGS, cap_pixels_per_frame=False),
        chat_template=TEMPLATES["qwen2_5_vl"],
    )


@pytest.fixture(scope="module")
def other() -> PreExpanded:
    return PreExpanded(base().tokenizer)


def image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conversation(*media: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "text", "text": "hello "}, *media, {"type": "text", "text": "seven"}]},
        {"role": "assistant", "content": "hello seven"},
    ]


def pictures(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"type": "image", "image": image(*size)} for size in sizes]


@pytest.mark.parametrize("with_video", [False, True])
def test_a_qwen2_5_conversation_is_what_its_processor_gives(qwen2_5: Qwen2_5_VLProcessor, with_video: bool) -> None:
    media = pictures((40, 24), (17, 33))
    given: dict[str, Any] = {"images": [part["image"] for part in media]}
    if with_video:
        clip = {"type": "video", "video": [image(24, 16) for _ in range(4)], "fps": 2.0}
        media.insert(1, clip)
        video = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in clip["video"]])
        given |= {"videos": [video], "do_sample_frames": False}
    messages = conversation(*media)
    sample = encode_conversation(messages, qwen2_5)
    expected = qwen2_5(text=[qwen2_5.apply_chat_template(messages, tokenize=False)], return_tensors="pt", **given)
    assert torch.equal(sample.input_ids, expected["input_ids"][0])
    for name in ("pixel_values", "image_grid_thw", *(("pixel_values_videos", "video_grid_thw") if with_video else ())):
        assert torch.equal(getattr(sample, name), expected[name]), name
    assert len(sample.video_grid_thw) == with_video
    assert qwen2_5.decode(sample.input_ids[sample.loss_mask]) == "hello seven<|im_end|>"
    assert sample.excluded_turns == ()
    measured = measure_conversation(messages, qwen2_5)
    for name in ("input_ids", "loss_mask", "image_grid_thw", "video_grid_thw"):
        assert torch.equal(getattr(measured, name), getattr(sample, name)), name


def written(*images: tuple[int, int]) -> str:
    """The conversation with the images as text, by hand."""
    pads = "".join(
        f"<|media_begin|>image<|media_content|>{'<|media_pad|>' * (-(-width // 4) * -(-height // 4))}<|media_end|>"
        for width, height in images
    )
    user = f"<|im_user|>user<|im_middle|>hello {pads}seven<|im_end|>"
    return f"{user}<|im_assistant|>assistant<|im_middle|>hello seven<|im_end|>"


@pytest.mark.parametrize("sizes", [(), ((8, 8),), ((5, 9), (16, 4), (3, 3))])
def test_another_processor_is_encoded(other: PreExpanded, sizes: tuple[tuple[int, int], ...]) -> None:
    messages = conversation(*pictures(*sizes))
    sample = encode_conversation(messages, other)
    text = written(*sizes)
    assert sample.input_ids.tolist() == other.tokenizer(text)["input_ids"]
    assert other.tokenizer.decode(sample.input_ids[sample.loss_mask]) == "hello seven<|im_end|>"
    grids = [[1, 2 * -(-height // 4), 2 * -(-width // 4)] for width, height in sizes]
    assert sample.image_grid_thw.tolist() == grids
    assert list(sample.pixel_values.shape) == [sum(rows * columns for _, rows, columns in grids), 3, 2, 2]
    patches = sample.pixel_values.split([rows * columns for _, rows, columns in grids]) if grids else ()
    images = [part["image"] for part in messages[0]["content"][1:-1]]
    assert [rows[0, :, 0, 0].tolist() for rows in patches] == [list(one.getpixel((0, 0))) for one in images]
    measured = measure_conversation(messages, other)
    for name in ("input_ids", "loss_mask", "image_grid_thw", "video_grid_thw"):
        assert torch.equal(getattr(measured, name), getattr(sample, name)), name


def test_several_turns_of_another_processor(other: PreExpanded) -> None:
    messages = [{"role": "system", "content": "hello"}, *conversation(), *conversation(*pictures((4, 4)))]
    messages[2] = messages[2] | {"train": False}
    sample = encode_conversation(messages, other)
    ids = sample.input_ids.tolist()
    # The last turn: two words and the end, without the header.
    assert sample.loss_mask.nonzero().flatten().tolist() == list(range(len(ids) - 3, len(ids)))
    assert sample.skipped_turns == (2,)


def test_special_tokens_of_another_processor_in_a_text(other: PreExpanded) -> None:
    messages = conversation()
    messages[0]["content"][0]["text"] = "a <|im_middle|> <|media_pad|>"
    with rejects("message 0", "'<|im_middle|>'", "'<|media_pad|>'"):
        encode_conversation(messages, other)
    sample = encode_conversation(messages, other, labels=LabelOptions(special_tokens="literal"))
    assert int((sample.input_ids == other.tokenizer.convert_tokens_to_ids("<|media_pad|>")).sum()) == 0


def test_a_kind_of_media_without_a_placeholder_is_rejected(other: PreExpanded) -> None:
    video = {"type": "video", "video": [image(8, 8)] * 2, "fps": 1.0}
    with rejects("message 0", "part 1: expected text or image, found video, which PreExpanded does not encode"):
        encode_conversation(conversation(video), other)


def with_method(processor: PreExpanded, name: str, method: Any) -> PreExpanded:
    changed = copy.copy(processor)
    setattr(changed, name, method)
    return changed


def test_a_processor_that_does_not_agree_with_itself_is_rejected(other: PreExpanded) -> None:
    messages = conversation(*pictures((8, 8)))
    fewer = with_method(other, "expand", lambda kind, shape: "<|media_pad|>" * 3)
    with rejects("image: expected 3 tokens <|media_pad|>, those of the grids [[1, 4, 4]], found 4"):
        encode_conversation(messages, fewer)

    def without_pixels(*args: Any) -> dict[str, Any]:
        return {"input_ids": other.encode(*args)["input_ids"]}

    with rejects("1 images in the messages: expected 1 grids and patches float32 [0, 3, 2, 2]"):
        encode_conversation(messages, with_method(other, "encode", without_pixels))
    flat = with_method(other, "patch_shapes", {"image": (12,)})
    with rejects("patches float32 [16, 12], found 1 grids [[1, 4, 4]] and patches torch.float32 [16, 3, 2, 2]"):
        encode_conversation(messages, flat)

    def in_bf16(*args: Any) -> dict[str, Any]:
        encoded = other.encode(*args)
        return encoded | {"pixel_values": encoded["pixel_values"].bfloat16()}

    with rejects("patches float32 [16, 3, 2, 2], found 1 grids [[1, 4, 4]] and patches torch.bfloat16 [16, 3, 2, 2]"):
        encode_conversation(messages, with_method(other, "encode", in_bf16))


def test_placeholders_without_media_and_media_without_placeholders_are_rejected(qwen2_5: Qwen2_5_VLProcessor) -> None:
    processor, none, one = as_conversation_processor(qwen2_5), torch.zeros(0, 3).long(), torch.tensor([[1, 4, 4]])
    for kind in ("image", "video"):
        tokens = torch.full((4,), getattr(qwen2_5, f"{kind}_token_id"))
        grids = {"image": none, "video": none}
        processor.check_tokens(tokens, grids | {kind: one})
        with rejects(f"found 4 {kind} placeholder tokens"):
            processor.check_tokens(tokens, grids)
        with rejects(f"{kind} 0 with grid (1, 4, 4) has no placeholders"):
            processor.check_tokens(torch.zeros(4).long(), grids | {kind: one})


def test_a_template_of_another_format_is_rejected(other: PreExpanded) -> None:
    changed = with_method(other, "render", lambda messages, **_: "<|im_user|>user hello<|im_end|>")
    with rejects("expected a role, '<|im_middle|>'", "does not have the other format"):
        encode_conversation(conversation(), changed)


def test_an_unknown_processor_is_rejected_by_name() -> None:
    class UnknownImageProcessor(Qwen2VLImageProcessor):
        pass

    processor = base()
    processor.image_processor = UnknownImageProcessor(**SETTINGS)
    with rejects("processor Qwen3VLProcessor: expected the image_processor", "found UnknownImageProcessor"):
        encode_conversation(conversation(), processor)
    processor = base()
    processor.video_processor = None
    with rejects("expected the video_processor", "found NoneType"):
        as_conversation_processor(processor)


def test_packs_for_the_models_are_made_with_a_published_processor(other: PreExpanded) -> None:
    config = read_config(Path(__file__).parents[1] / "data" / "configs" / "Qwen3-VL-2B-Instruct.json")
    with rejects("processor PreExpanded: expected a processor of transformers"):
        check_processor(other, config)


def test_the_tokens_of_the_interface_must_be_tokens(other: PreExpanded) -> None:
    with rejects("tokenizer: expected the special token <|im_system|> of the other format, found none"):
        encode_conversation(conversation(), with_method(other, "tokenizer", base().tokenizer))
    tokenizer = base().tokenizer
    tokenizer.add_tokens(list(TOKENS))
    messages = conversation()
    messages[0]["content"][0]["text"] = "<|media_pad|>"
    with rejects("message 0", "the special tokens '<|media_pad|>'"):
        encode_conversation(messages, with_method(other, "tokenizer", tokenizer))
