"""Tools, calls and results are rendered in a published form, or rejected."""

import pytest
from transformers import Qwen3VLProcessor

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.labels.turns import Turn, match_turns
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.errors import rejects
from tests.unit.test_turns import TEMPLATES, processor_with, supervised, talk

RESULTS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "tool", "content": "one"},
    {"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "two"}]},
]
KEPT = [Turn("user", "q"), Turn("assistant", "a")]
IMAGE = {"image": "<I>", "video": "<V>"}


def test_the_turn_of_tool_results_has_all_of_them_in_order() -> None:
    turns = [*KEPT, Turn("user", "(one) (<I>two)")]
    assert match_turns(turns, RESULTS, IMAGE) == turns
    for content, name in (
        ("(<I>two) (one)", "message 3 (tool)"),
        ("(one)", "message 2 (tool)"),  # an image is missing
        ("(one) (<I>", "message 3 (tool)"),
        ("(one <I>two) (<I>two)", "message 2 (tool)"),
        ("(on) (<I>two)", "message 2 (tool)"),
    ):
        with rejects(f"{name}: the chat template changes the text"):
            match_turns([*KEPT, Turn("user", content)], RESULTS, IMAGE)
    for more in ([], [Turn("tool", "(one) (<I>two)")], [Turn("user", "(one)"), Turn("user", "(<I>two)")]):
        with rejects("expected one turn for each", "(user, assistant, tool)", "as one user turn"):
            match_turns([*KEPT, *more], RESULTS, IMAGE)


def test_all_tools_are_in_the_system_prompt() -> None:
    messages = RESULTS[:2]
    for turns in (
        KEPT,
        [Turn("system", '{"name": "a"}'), *KEPT],
        [Turn("user", '{"name": "a"} {"name": "é"}'), KEPT[1]],
    ):
        with rejects("tools: the chat template does not render them in its system prompt"):
            match_turns(turns, messages, IMAGE, [{"name": "a"}, {"name": "é"}])
    assert match_turns([Turn("system", '{"name": "a"}{"name": "é"}'), *KEPT], messages, IMAGE, [{"name": "é"}]) == KEPT


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_calls_are_learned_as_each_template_writes_them(name: str) -> None:
    """Qwen3.5 writes Python's True and None, later templates JSON's."""
    calls = [{"function": {"name": "f", "arguments": {"on": True, "none": None, "list": [True]}}}]
    messages = [*talk("q"), {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": calls}]
    sample = encode_conversation(messages, processor_with(name))
    values = ("True", "None") if name == "qwen3_5_think" else ("true", "null")
    assert supervised(sample, processor_with(name)) == [
        f"<tool_call>\n<function=f>\n<parameter=on>\n{values[0]}\n</parameter>\n<parameter=none>\n{values[1]}\n"
        "</parameter>\n<parameter=list>\n[true]\n</parameter>\n</function>\n</tool_call><|im_end|>"
    ]


CALL_WRITTEN = "{{- tool_call.arguments | tojson }}"
OTHER_TEMPLATES = {
    "no arguments": TEMPLATES["qwen3_vl"].replace(CALL_WRITTEN, "{}"),
    "other spaces": TEMPLATES["qwen3_vl"].replace(CALL_WRITTEN, "{{- tool_call.arguments | tojson(indent=2) }}"),
    "text after the call": TEMPLATES["qwen3_vl"].replace("}\\n</tool_call>", "}\\n</tool_call>."),
    "first call only": TEMPLATES["qwen3_vl"].replace("in message.tool_calls", "in message.tool_calls[:1]"),
}


@pytest.mark.parametrize("name", OTHER_TEMPLATES)
def test_calls_in_another_form_are_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, name, OTHER_TEMPLATES[name])
    assert OTHER_TEMPLATES[name] != TEMPLATES["qwen3_vl"]
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]
    with rejects("message 1 (assistant): the chat template does not render the tool calls in a known form"):
        encode_conversation([*talk("q"), {"role": "assistant", "tool_calls": calls}], processor_with(name))


def test_text_after_a_call_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, "after", OTHER_TEMPLATES["text after the call"])
    with rejects("does not render the tool calls in a known form", "</tool_call>."):
        encode_conversation([*talk("q"), {"role": "assistant", "tool_calls": [{"name": "f"}]}], processor_with("after"))


def test_a_newline_that_a_template_adds_before_a_call_is_not_learned() -> None:
    """With a tokenizer that does not merge it with the newline of the header."""
    parts = build_processor(["x"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=64)
    added = TEMPLATES["qwen3_vl"].replace("(loop.first and message.content) or", "loop.first or")
    messages = [*talk("q"), {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    for template, number in ((TEMPLATES["qwen3_vl"], 0), (added, 1)):
        processor = Qwen3VLProcessor(
            parts.image_processor, parts.tokenizer, parts.video_processor, chat_template=template
        )
        sample = encode_conversation(messages, processor, allow_no_loss=True)
        assert len(sample.excluded_turns) == number
        assert bool(sample.loss_mask.any()) == (number == 0)


def test_a_template_that_adds_to_content_before_a_call_is_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    template = TEMPLATES["qwen3_vl"].replace("{{- message.content }}", "{{- message.content + '!' }}")
    monkeypatch.setitem(TEMPLATES, "added", template)
    messages = [*talk("q"), {"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}]
    with rejects("no supervised token", "message 1 (assistant): expected 'a", "found 'a!"):
        encode_conversation(messages, processor_with("added"))
