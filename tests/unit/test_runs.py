"""Runs of placeholders are tokenized as one token and repeated: the tokens are those of the tokenizer."""

import pytest
import torch
from transformers import Qwen3VLProcessor

from megatron_vlbridge.data.processors.runs import RunTokenizer, encode_runs
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.errors import rejects

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
TEXTS = {
    "no run": "<|im_start|>user\nWhich digit is this?<|im_end|>\n",
    "empty": "",
    "one token": f"<|vision_start|>{IMAGE}<|vision_end|>",
    "runs alone": IMAGE * 3 + VIDEO * 2 + IMAGE,
    "between texts": f" seven {IMAGE * 1000} seven\n\n{VIDEO * 7}{IMAGE * 5}<0.2 seconds>{VIDEO * 7}.",
}


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    return build_processor(["seven"], patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)


@pytest.mark.parametrize("name", TEXTS)
def test_the_tokens_of_a_text_are_those_of_the_tokenizer(processor: Qwen3VLProcessor, name: str) -> None:
    found = encode_runs(TEXTS[name], processor.tokenizer, [IMAGE, VIDEO])
    assert found.dtype == torch.int64
    assert found.tolist() == processor.tokenizer(TEXTS[name])["input_ids"]


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_a_batch_is_that_of_the_tokenizer(processor: Qwen3VLProcessor, tensors: str | None) -> None:
    texts, tokenizer = list(TEXTS.values()), processor.tokenizer
    found = RunTokenizer(tokenizer, [IMAGE, VIDEO])(texts, padding=True, return_tensors=tensors)
    expected = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    assert isinstance(found["input_ids"], torch.Tensor if tensors else list)
    ids, mask = (torch.as_tensor(found[name]) for name in ("input_ids", "attention_mask"))
    assert torch.equal(mask, expected["attention_mask"])
    assert torch.equal(ids[mask.bool()], expected["input_ids"][mask.bool()])


def test_a_tokenizer_that_truncates_does_not_truncate(processor: Qwen3VLProcessor) -> None:
    text = f"{IMAGE * 4} seven seven seven"
    expected = processor.tokenizer(text)["input_ids"]
    for settings in ({"truncation": True, "max_length": 3}, {"max_length": 3}, {"truncation": True, "stride": 1}):
        assert encode_runs(text, processor.tokenizer, [IMAGE, VIDEO], **settings).tolist() == expected
        found = RunTokenizer(processor.tokenizer, [IMAGE, VIDEO])([text], **settings)
        assert found["input_ids"] == [expected]


def test_a_placeholder_that_is_not_one_token_is_rejected(processor: Qwen3VLProcessor) -> None:
    with rejects("expected one token for each of 1 runs of seven, found 0"):
        encode_runs("eleven seventy", processor.tokenizer, ["seven"])
