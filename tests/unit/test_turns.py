"""Under the published chat templates, the supervised tokens are byte for byte the message, or there are none."""

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLProcessor

from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.labels.turns import Turn, generation_prompts, split_turns
from megatron_vlbridge.data.processors.published import as_conversation_processor
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.errors import rejects

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
TEMPLATES = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.jinja"))}
QWEN3_PROMPT = (
    "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}"
)
# Its generation prompt always starts the reasoning, like that of Qwen3-VL Thinking.
TEMPLATES["always_thinking"] = TEMPLATES["qwen3"].replace(
    QWEN3_PROMPT, "{{- '<|im_start|>assistant\\n<think>\\n' }}{% if false %}"
)
REASONING = "<think>\nhm\n</think>\n\n"
EMPTY_REASONING = "<think>\n\n</think>\n\n"


@functools.cache
def base() -> Qwen3VLProcessor:
    processor = build_processor(["hello", "\n\n", "\n\n\n"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=64)
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    return processor


@functools.cache
def processor_with(template: str) -> Qwen3VLProcessor:
    parts = base()
    return Qwen3VLProcessor(
        parts.image_processor, parts.tokenizer, parts.video_processor, chat_template=TEMPLATES[template]
    )


def talk(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def supervised(sample: Sample, processor: Qwen3VLProcessor) -> list[str]:
    """The runs of supervised tokens, decoded."""
    runs: list[list[int]] = [[]]
    for token, has_loss in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if has_loss:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [processor.tokenizer.decode(run) for run in runs if run]


def test_the_generation_prompt_without_a_thinking_switch_always_starts_the_reasoning() -> None:
    for flags in ({}, {"enable_thinking": False}):
        prompt = processor_with("always_thinking").tokenizer.apply_chat_template(
            talk("x"), chat_template=TEMPLATES["always_thinking"], tokenize=False, add_generation_prompt=True, **flags
        )
        assert prompt.endswith("<|im_start|>assistant\n<think>\n")


def fresh(template: str) -> Qwen3VLProcessor:
    """A processor of which no prompt is known."""
    processor = build_processor(["hello"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=64)
    processor.chat_template = template
    return processor


def prompts_of(processor: Qwen3VLProcessor) -> list[tuple[str, list[int]]]:
    return [(prompt.text, prompt.ids) for prompt in generation_prompts(as_conversation_processor(processor))]


def test_generation_prompts_are_those_of_the_template_that_the_processor_has_now() -> None:
    processor = fresh(TEMPLATES["qwen3_vl"])
    for template in [*TEMPLATES.values(), {"default": TEMPLATES["qwen3"], "other": "x"}, TEMPLATES["qwen3_vl"]]:
        processor.chat_template = template
        assert prompts_of(processor) == prompts_of(fresh(template))


def test_generation_prompts_change_with_the_tokens_of_the_tokenizer() -> None:
    template = TEMPLATES["always_thinking"]
    processor, expected = fresh(template), fresh(template)
    before = prompts_of(processor)
    for one in (processor, expected):
        one.tokenizer.add_tokens(["<think>"])
    assert prompts_of(processor) == prompts_of(expected) != before
    other = fresh(template)
    assert prompts_of(other) == before


def test_generation_prompts_change_with_the_special_tokens_that_the_template_reads() -> None:
    processor = fresh(TEMPLATES["qwen3_vl"].replace("assistant\\n'", "assistant\\n' + pad_token"))
    for token in ("hello", "<|im_end|>"):
        processor.tokenizer.pad_token = token
        assert [text for text, _ in prompts_of(processor)] == [f"<|im_start|>assistant\n{token}"]


def test_generation_prompts_are_those_of_the_tokenizer_that_the_processor_has_now() -> None:
    words = ["hello"], ["seven"]
    one, other = (build_processor(word, patch_size=4, merge_size=2, min_pixels=64, max_pixels=64) for word in words)
    one.chat_template = TEMPLATES["qwen3_vl"].replace("assistant\\n'", "assistant\\nhello'")
    before = prompts_of(one)
    assert len(one.tokenizer) == len(other.tokenizer)
    assert one.tokenizer.special_tokens_map == other.tokenizer.special_tokens_map
    one.tokenizer = other.tokenizer
    after = prompts_of(one)
    assert after[0][0] == before[0][0]
    assert after[0][1] == other.tokenizer.encode(after[0][0]) != before[0][1]


def test_generation_prompts_with_the_time_are_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = fresh(TEMPLATES["qwen3_vl"].replace("assistant\\n'", "assistant\\n' + strftime_now('%Y')"))
    for year in ("2026", "2027"):
        clock = type("Clock", (), {"now": lambda year=year: type("Now", (), {"strftime": lambda _, form: year})()})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        assert [text for text, _ in prompts_of(processor)] == [f"<|im_start|>assistant\n{year}"]


def test_generation_prompts_are_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, calls = fresh(TEMPLATES["qwen3"]), []
    apply = processor.apply_chat_template
    monkeypatch.setattr(
        processor, "apply_chat_template", lambda *args, **flags: calls.append(0) or apply(*args, **flags)
    )
    assert prompts_of(processor) == prompts_of(processor)
    assert len(calls) == 3


# The supervised text of each assistant message; None: excluded from the loss.
THINKING = ("qwen3_5_think", "qwen3_5_nothink", "qwen3_6")
CASES: dict[str, tuple[tuple[str, ...], dict[str, list[str | None]]]] = {
    "plain": (
        ("q", "a"),
        {"qwen3_vl": ["a"], "qwen3": ["a"], "qwen3_8": ["a"], **{key: ["a"] for key in THINKING}}
        | {"always_thinking": [None]},  # empty reasoning is added after the prompt
    ),
    "two plain turns": (
        ("q", "a", "r", "b"),
        {"qwen3_vl": ["a", "b"], "qwen3": ["a", "b"], "qwen3_8": ["a", "b"], **{key: [None, "b"] for key in THINKING}}
        | {"always_thinking": [None, None]},
    ),
    "reasoning": (
        ("q", f"{REASONING}a"),
        {"qwen3_vl": [f"{REASONING}a"], "qwen3": [f"{REASONING}a"], "qwen3_8": [f"{REASONING}a"]}
        | {key: ["hm\n</think>\n\na"] for key in (*THINKING, "always_thinking")},
    ),
    "two turns with reasoning": (
        ("q", f"{REASONING}a", "r", f"{REASONING}b"),
        {name: [f"{REASONING}a", f"{REASONING}b"] for name in ("qwen3_vl", "qwen3_8")}
        | {"qwen3": [None, f"{REASONING}b"]}
        | {key: [None, "hm\n</think>\n\nb"] for key in (*THINKING, "always_thinking")},
    ),
    "empty reasoning": (
        ("q", f"{EMPTY_REASONING}a"),
        {"qwen3_vl": [f"{EMPTY_REASONING}a"], "qwen3_8": [f"{EMPTY_REASONING}a"]}
        | {key: ["a"] for key in ("qwen3", *THINKING)}
        | {"always_thinking": [None]},  # the newline of the prompt merges with the next
    ),
    "the rest of the reasoning that the prompt starts": (
        ("q", "hm\n</think>\n\na"),
        {name: ["hm\n</think>\n\na"] for name in ("qwen3_vl", "qwen3_8", *THINKING, "always_thinking")}
        | {"qwen3": [None]},
    ),
    "a literal </think>": (
        ("q", "write </think> last"),
        {name: ["write </think> last"] for name in ("qwen3_vl", "qwen3_8")}
        | {key: [None] for key in ("qwen3", *THINKING, "always_thinking")},
    ),
    "trailing whitespace": (
        ("q", "a \n"),
        {name: ["a \n"] for name in ("qwen3_vl", "qwen3")}
        | {key: [None] for key in ("qwen3_8", *THINKING, "always_thinking")},
    ),
    "leading spaces": (
        ("q", "  a"),
        {name: ["  a"] for name in ("qwen3_vl", "qwen3")}
        | {key: [None] for key in ("qwen3_8", *THINKING, "always_thinking")},
    ),
    "empty content": (
        ("q", ""),
        {key: [""] for key in ("qwen3_vl", "qwen3", "qwen3_8", *THINKING)} | {"always_thinking": [None]},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_text_under_each_template(case: str, name: str) -> None:
    texts, cases = CASES[case]
    expected = cases["qwen3_vl" if name == "qwen2_5_vl" else name]
    sample = encode_conversation(talk(*texts), processor_with(name), allow_no_loss=True)
    assert supervised(sample, processor_with(name)) == [f"{text}<|im_end|>" for text in expected if text is not None]
    missing = [2 * index + 1 for index, text in enumerate(expected) if text is None]
    assert [turn.message for turn in sample.excluded_turns] == missing


PIECES = ["<think>", "</think>", "<think>\n", "\n</think>\n\n", "hello", " seven", "\n", "\n\n", " ", "\t", "é", "😀"]
PIECES += ["assistant", "user\n", "\r\n", "\u00a0", "\u2028", "{{ x }}", "{%", "<|im_start", "|im_end|>", "\x00"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def as_prompted(messages: list, index: int, processor: Qwen3VLProcessor) -> tuple[str, str] | None:
    """Oracle: what the model must generate at inference after the first `index` messages to get this conversation.

    The preceding messages are rendered with every generation prompt of the template. The longest one that is a prefix
    of the tokens of the whole conversation is used. Returns the assistant content in that prompt, and the remaining
    text to generate. None: no prompt is a prefix.
    """
    tokenizer = processor.tokenizer

    def render(messages: list, **variables: bool) -> str:
        template = processor.chat_template
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    whole = tokens(render(messages))
    prompts = [
        tokens(render(messages[:index], add_generation_prompt=True, **variables))
        for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    lengths = [len(prompt) for prompt in prompts if whole[: len(prompt)] == prompt]
    if not lengths:
        return None
    prefix = tokenizer.decode(whole[: max(lengths)]).rpartition("<|im_start|>assistant\n")[2]
    return prefix, tokenizer.decode(whole[max(lengths) :]).split("<|im_end|>")[0]


# Qwen3.8's thinking switch also changes the system prompt, so no prompt is a prefix of the rendered conversation.
@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=st.none() | TEXT)
@example(turns=[("", "<think>\n<think>\nhello\n</think>\n\n")], system=None)  # templates keep one of the two
@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"qwen3_8"}))
def test_the_supervised_text_is_what_the_model_must_generate_at_inference(
    name: str, turns: list[tuple[str, str]], system: str | None
) -> None:
    processor = processor_with(name)
    messages = talk(*(text for turn in turns for text in turn))
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    sample = encode_conversation(messages, processor, allow_no_loss=True)
    excluded = {turn.message for turn in sample.excluded_turns}
    expected = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prefix, generated = as_prompted(messages, index, processor) or ("", None)
            # The prompt of a thinking model may contain the start of the message.
            same = generated in (message["content"], message["content"].removeprefix(prefix))
            assert (index not in excluded) == same, (message, prefix, generated)
            expected += [f"{generated}<|im_end|>"] if same else []
    assert supervised(sample, processor) == expected


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), min_size=1, max_size=5))
@pytest.mark.parametrize("name", TEMPLATES)
def test_with_any_order_of_roles_a_turn_is_supervised_unchanged_or_excluded(
    name: str, texts: list[tuple[str, str]]
) -> None:
    messages = [*talk("q"), *({"role": role, "content": text} for role, text in texts)]
    sample = encode_conversation(messages, processor_with(name), allow_no_loss=True)
    excluded = {turn.message for turn in sample.excluded_turns}
    answers = [
        message["content"]
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index not in excluded
    ]
    for run, answer in zip(supervised(sample, processor_with(name)), answers, strict=True):
        assert run.removesuffix("<|im_end|>") in (
            answer,
            *(answer.removeprefix(p) for p in ("<think>\n", EMPTY_REASONING)),
        )


def test_a_conversation_without_supervised_tokens_is_rejected_with_the_difference() -> None:
    tail = "..." + "x" * 20
    for name, text, difference in (
        ("always_thinking", "a", r"expected 'a', found '<think>\n\n</think>\n\na'"),
        ("qwen3_5_think", "write </think> last", r"expected 'write </think> last', found 'write\n</think>\n\n last'"),
        ("qwen3_6", "x" * 100 + " ", f"expected '{tail} ', found '{tail}'"),
    ):
        with rejects("no supervised token", f"message 1 (assistant): {difference}"):
            encode_conversation(talk("q", text), processor_with(name))


def test_a_turn_that_starts_with_no_generation_prompt_is_excluded() -> None:
    sample = encode_conversation(talk("q", "a", "r", "b"), processor_with("qwen3_5_think"))
    assert [turn.message for turn in sample.excluded_turns] == [1]
    assert "starts with none of the template's generation prompts" in sample.excluded_turns[0].reason


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_whitespace_around_user_content_may_be_stripped(name: str) -> None:
    for text in (" hello \n", "<think>\nhm\n</think>\n\nhello", "", "x" * 500):
        encode_conversation([{"role": "system", "content": text}, *talk(text, f"{REASONING}a")], processor_with(name))


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_images_keep_their_position_in_the_text(name: str) -> None:
    image = {"type": "image", "image": Image.new("RGB", (8, 8))}
    content = [{"type": "text", "text": "hello "}, image, {"type": "text", "text": " and "}, image]
    messages = [{"role": "user", "content": content}, *talk("", f"{REASONING}a")[1:]]
    sample = encode_conversation(messages, processor_with(name))
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\nhello {pad} and {pad}<|im_end|>" in processor_with(name).tokenizer.decode(sample.input_ids)


REJECTED = {
    "system in the middle is dropped": ("qwen3_vl", [*talk("q", "a"), {"role": "system", "content": "s"}], "one turn"),
    "system in the middle": (
        "qwen3_5_think",
        [*talk("q", "a"), {"role": "system", "content": "s"}],
        "must be at the beg",
    ),
    "no user": ("qwen3_6", [{"role": "assistant", "content": "a"}], "No user query"),
    "text parts are dropped": (
        "qwen3",
        [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *talk("", "a")[1:]],
        "message 0 (user): the chat template changes the text: expected 'q', found ''",
    ),
}


@pytest.mark.parametrize(("name", "messages", "problem"), REJECTED.values(), ids=REJECTED.keys())
def test_a_template_that_drops_a_message_is_rejected(name: str, messages: list, problem: str) -> None:
    with rejects(problem):
        encode_conversation(messages, processor_with(name))


def test_turns_are_split_only_at_their_special_tokens() -> None:
    text = "<|im_start|>user\nim_end\n\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    assert split_turns(text) == [Turn("user", "im_end\n\n"), Turn("assistant", "")]
