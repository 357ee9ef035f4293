"""Labels equal masks made by hand, under the published templates and tokenizers of three families."""

import argparse
import copy
import functools
import json
from itertools import groupby
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import Qwen3VLProcessor

from megatron_vlbridge.data.chat import Sample, encode_conversation, measure_conversation
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.labels.special import hide_special_tokens, plain_ids, shown_tokens
from megatron_vlbridge.demo.tiny_processor import build_processor
from megatron_vlbridge.training.launch.arguments import add_arguments
from megatron_vlbridge.training.launch.labels import label_options
from tests import label_cases, label_cases_options, label_cases_special, label_cases_tools
from tests.errors import rejects
from tests.label_cases import bot, text, user
from tests.published_tokenizer import build_tokenizer
from tests.unit.test_turns import TEMPLATES

CASES = label_cases.CASES | label_cases_tools.CASES | label_cases_options.CASES
CASES |= label_cases_special.CASES
FAMILIES = label_cases.FAMILIES
PARTS = build_processor(["x"], patch_size=16, merge_size=4, min_pixels=64 * 64, max_pixels=64 * 64)
tokenizer = functools.cache(build_tokenizer)


@functools.cache
def processor_of(family: str) -> Qwen3VLProcessor:
    name = "qwen3_6" if family == "qwen3_5" else "qwen"
    template = TEMPLATES[FAMILIES[family]]
    return Qwen3VLProcessor(PARTS.image_processor, tokenizer(name), PARTS.video_processor, chat_template=template)


def marked(sample: Sample, processor: Qwen3VLProcessor) -> str:
    """The tokens as text in the form of `label_cases`."""
    special = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    tokens = zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)
    pieces = []
    for has_loss, run in groupby(tokens, key=lambda token: token[1]):
        piece = ""
        for is_special, group in groupby((token for token, _ in run), key=special.__contains__):
            decoded = processor.tokenizer.decode(list(group))
            piece += decoded if is_special else decoded.replace("<|", "\\<|")
        pieces.append(f"⟦{piece}⟧" if has_loss else piece)
    return "".join(pieces)


def assistant_turns(text: str) -> tuple[int, int]:
    """How many assistant turns a marked text has, and how many of them are learned."""
    own = text.replace("\\<|im_", "")
    turns = [turn.partition("<|im_end|>")[0] for turn in own.split("<|im_start|>assistant\n")[1:]]
    return len(turns), sum("⟦" in turn for turn in turns)


def test_there_are_sixty_masks_and_more() -> None:
    """Fewer for Qwen2.5-VL, whose template has neither tools nor `reasoning_content`: these are rejected."""
    for family, number in (("qwen2_5_vl", 40), ("qwen3_vl", 60), ("qwen3_5", 60)):
        assert sum(isinstance(case.expected[family], str) for case in CASES.values()) >= number


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_the_labels_are_those_marked_by_hand(name: str, family: str) -> None:
    case = CASES[name]
    processor, expected = processor_of(family), case.expected[family]
    if not isinstance(expected, str):
        with rejects(*expected):
            encode_conversation(case.messages, processor, **case.options)
        return
    sample = encode_conversation(case.messages, processor, allow_no_loss=True, **case.options)
    assert marked(sample, processor) == expected
    turns, learned = assistant_turns(expected)
    assert len(sample.excluded_turns) + len(sample.skipped_turns) == turns - learned
    if "labels" not in case.options and "train" not in name:
        assert sample.skipped_turns == ()


# Answers of which only the end would be learned, and the families for which that is so: the template of Qwen3.5 strips
# spaces, so that the turn is excluded, and the others learn a think block as it is written.
BLANK = {
    "empty": (bot(""), FAMILIES),
    "empty reasoning": (bot("", reasoning_content="", weight=0.5), FAMILIES),
    "spaces": (bot("  "), ("qwen2_5_vl", "qwen3_vl")),
    "parts": (bot([text(""), text(" ")]), ("qwen2_5_vl", "qwen3_vl")),
    "empty think block": (bot("<think>\n\n</think>\n\n"), ("qwen3_5",)),
}
BLANK_FAMILIES = [(name, family) for name, (_, families) in BLANK.items() for family in families]


@pytest.mark.parametrize(("name", "family"), BLANK_FAMILIES)
def test_an_answer_of_which_only_the_end_is_learned_is_rejected(name: str, family: str) -> None:
    """Unless it is not to be learned."""
    answer, processor = BLANK[name][0], processor_of(family)
    messages = [user("Q"), bot("A"), user("R"), answer]
    for encode in (encode_conversation, measure_conversation):
        with rejects('give it "train": false', start="message 3 (assistant): expected an answer to learn, found "):
            encode(messages, processor)
        encode([*messages, user("R"), bot("B")], processor, labels=LabelOptions(turns="last"))
        if family == "qwen3_5":
            encode([user("R"), bot("", reasoning_content="So.")], processor)
        encode([user("R"), answer | {"train": False, "weight": 0}, user("R"), bot("B")], processor)


def test_the_conversation_of_the_documentation_is_learned() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    conversation = json.loads(page.partition("```json\n")[2].partition("```")[0])
    messages = conversation["messages"]
    messages[2]["content"] = [label_cases.PICTURE]
    processor = processor_of("qwen3_5")
    sample = encode_conversation(messages, processor, tools=conversation["tools"])
    assert processor.decode(sample.input_ids[sample.loss_mask]) == (
        "I have to look.\n</think>\n\n<tool_call>\n<function=look>\n<parameter=side>\nleft\n</parameter>\n</function>\n"
        "</tool_call><|im_end|>A cat.<|im_end|>"
    )


def test_turns_that_are_not_to_be_learned_are_skipped_not_excluded() -> None:
    case = CASES["last and train false"]
    sample = encode_conversation(case.messages, processor_of("qwen3_5"), **case.options)
    assert (sample.skipped_turns, sample.excluded_turns) == ((1, 3), ())
    with rejects("no supervised token: message 3 (assistant)", '"train": false', "last user query"):
        encode_conversation(case.messages[:4], processor_of("qwen3_5"), **case.options)


def test_an_unknown_choice_of_turns_is_rejected() -> None:
    with rejects("turns: expected one of all, last, found 'first'"):
        LabelOptions(turns="first")
    with rejects("special_tokens: expected one of reject, literal, found 'text'"):
        LabelOptions(special_tokens="text")


def test_the_arguments_of_a_run_say_what_is_learned() -> None:
    parser = add_arguments(argparse.ArgumentParser())
    assert label_options(parser.parse_args([])) == LabelOptions()
    assert label_options(parser.parse_args(["--label-turns", "last"])) == LabelOptions(turns="last")
    assert label_options(parser.parse_args(["--label-newline"])) == LabelOptions(newline=True)
    given = label_options(parser.parse_args(["--special-tokens-in-text", "literal"]))
    assert given == LabelOptions(special_tokens="literal")


@pytest.mark.parametrize(("written", "found"), [("", "''"), (" ", "' '"), ("\n\n", r"'\n\n'")])
def test_a_template_without_the_newline_is_rejected_if_it_is_to_be_learned(written: str, found: str) -> None:
    whole = processor_of("qwen3_vl")
    template = whole.chat_template.replace("'<|im_end|>\\n'", repr(f"<|im_end|>{written}"))
    processor = Qwen3VLProcessor(whole.image_processor, whole.tokenizer, whole.video_processor, chat_template=template)
    encode_conversation(CASES["newline"].messages[:2], processor)
    with rejects("expected a newline after <|im_end|>", f"found {found}", "--label-newline"):
        encode_conversation(CASES["newline"].messages[:2], processor, labels=LabelOptions(newline=True))


SANITIZED = [
    (name, family)
    for name, case in label_cases_special.CASES.items()
    for family in FAMILIES
    if case.options and not name.startswith(("two parts", "keys")) and isinstance(case.expected[family], str)
]


@pytest.mark.parametrize(("name", "family"), SANITIZED)
def test_special_tokens_in_texts_are_encoded_as_transformers_does(name: str, family: str) -> None:
    """Oracle: `sanitize_control_tokens`, of the same tokens: by default it also splits others of the template.

    It leaves special tokens in keys and joins those of two parts.
    """
    case, processor = CASES[name], processor_of(family)
    processor.tokenizer.chat_control_tokens = []
    messages = [{key: value for key, value in message.items() if key != "train"} for message in case.messages]
    for message in messages:
        for one in message.get("tool_calls", []):
            if isinstance(one["function"]["arguments"], str):
                one["function"] = {**one["function"], "arguments": json.loads(one["function"]["arguments"])}
    expected = processor.apply_chat_template(
        copy.deepcopy(messages),
        tools=case.options.get("tools"),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
    )
    sample = encode_conversation(case.messages, processor, allow_no_loss=True, **case.options)
    assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
    if "pixel_values" in expected:
        assert torch.equal(sample.pixel_values, expected["pixel_values"])
        assert torch.equal(sample.image_grid_thw, expected["image_grid_thw"])


def test_a_tokenizer_that_gives_the_special_token_for_plain_text_is_rejected() -> None:
    processor = build_processor(["x"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=64)
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") not in plain_ids("<|im_end|>", processor.tokenizer)
    processor.tokenizer.add_tokens([AddedToken("<|other|>", special=False)])
    with rejects("it cannot encode '<|other|>' as plain text"):
        plain_ids("<|other|>", processor.tokenizer)


def test_the_longer_of_two_special_tokens_is_hidden() -> None:
    messages = [{"role": "user", "content": "<a<b>> <b>"}]
    for special in (["<b>", "<a<b>>"], ["<a<b>>", "<b>"]):
        hidden, tools, tokens = hide_special_tokens(messages, [], special)
        assert len(hidden[0]["content"]) == 3
        assert shown_tokens(hidden[0]["content"], tokens) == "<a<b>> <b>"
        assert set(tokens.values()) == set(special)
        assert tools == []


def test_the_reason_of_an_excluded_turn_shows_its_special_tokens() -> None:
    case = CASES["special tokens in an answer"]
    sample = encode_conversation(case.messages, processor_of("qwen3_5"), **case.options)
    assert [turn.message for turn in sample.excluded_turns] == [1]
    assert "'<|im_end|>' starts with none of the template's generation prompts" in sample.excluded_turns[0].reason
