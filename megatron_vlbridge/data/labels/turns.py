r"""The loss mask of a conversation, derived from the turns that the chat template rendered.

A turn is `<|im_start|>`, the role, a newline, the content and `<|im_end|>`. At inference the model generates after the
generation prompt of the template: `<|im_start|>assistant\n`, for thinking models followed by `<think>\n` or
`<think>\n\n</think>\n\n`. In an assistant turn the supervised tokens are therefore those after the longest matching
generation prompt, and only if they decode to exactly the content of the message. Templates modify messages (they drop
the reasoning of earlier turns, add an empty one, strip whitespace); a modified turn is excluded from the loss.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_vlbridge.data.labels.template import render
from megatron_vlbridge.data.labels.token_text import token_texts
from megatron_vlbridge.data.labels.tools import call_texts, tool_text
from megatron_vlbridge.data.media import Conversation, Message
from megatron_vlbridge.data.messages import message_calls, message_name, message_text
from megatron_vlbridge.data.processors.interface import CHATML, ConversationProcessor, TurnFormat
from megatron_vlbridge.errors import VLBridgeError

MAX_EXCERPT = 60  # characters of a text in an error


@dataclass(frozen=True)
class Turn:
    """A rendered turn: its role, and the text between its header and its end token."""

    role: str
    content: str


@dataclass(frozen=True)
class ExcludedTurn:
    """An assistant turn that is excluded from the loss: the index of its message, and the reason."""

    message: int
    reason: str

    def __str__(self) -> str:
        return f"message {self.message}: {self.reason}"


@dataclass(frozen=True)
class GenerationPrompt:
    r"""The text and token ids after which the model generates an assistant turn.

    `prefix` is the start of the assistant content that the prompt already contains, such as `<think>\n`.
    """

    text: str
    ids: list[int]
    prefix: str


def split_turns(text: str, turn_format: TurnFormat = CHATML) -> list[Turn]:
    r"""Split a rendered conversation into its turns; only whitespace is allowed between them.

    Example: `split_turns("<|im_start|>user\nWho?<|im_end|>\n")` is `[Turn(role='user', content='Who?')]`.
    """
    before, *pieces = re.split("|".join(map(re.escape, turn_format.starts)), text)
    turns: list[Turn] = []
    between = before
    for index, piece in enumerate(pieces):
        if between.strip():
            raise _text_outside_turns(f"before turn {index}", between)
        turn, end, between = piece.partition(turn_format.end)
        role, separator, content = turn.partition(turn_format.separator)
        if not end or not separator:
            raise VLBridgeError(
                f"turn {index}: expected a role, {turn_format.separator!r}, content and {turn_format.end}, found "
                f"{piece[:MAX_EXCERPT]!r}; the chat template does not have the {turn_format.name} format"
            )
        turns.append(Turn(role, content))
    if between.strip():
        raise _text_outside_turns("after the last turn", between)
    return turns


def turn_groups(messages: Conversation) -> list[list[int]]:
    """The messages of each turn, by index: consecutive tool messages are one turn of the user, others one each."""
    groups: list[list[int]] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool" and index and messages[index - 1]["role"] == "tool":
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def match_turns(
    turns: Sequence[Turn], messages: Conversation, placeholders: Mapping[str, str], tools: Sequence[Any] = ()
) -> list[Turn]:
    """The turn of each of `turn_groups`, after checking that the template kept the content of all but the assistant.

    The template may start with its own system prompt. It may add to the texts and strip whitespace from their ends, as
    the published templates do. Assistant content is checked by `supervised_spans`, but its tool calls here.

    Raises VLBridgeError: messages and turns do not match one to one; a text was modified, or an image or video dropped;
    the tools or calls are not rendered in a published form.
    """
    groups = turn_groups(messages)
    roles = ["user" if messages[group[0]]["role"] == "tool" else messages[group[0]]["role"] for group in groups]
    found = [turn.role for turn in turns]
    added = 1 if found[:1] == ["system"] and roles[0] != "system" else 0
    if found[added:] != roles:
        names = [messages[group[0]]["role"] for group in groups]
        raise VLBridgeError(
            f"expected one turn for each of the {len(messages)} messages ({', '.join(names)}), but the chat template "
            f"rendered {len(turns)} ({', '.join(found) or 'none'})"
            + ("; consecutive tool messages are expected as one user turn" if "tool" in names else "")
        )
    for tool in tools:
        if turns[0].role != "system" or tool_text(tool) not in turns[0].content:
            raise VLBridgeError(
                f"tools: the chat template does not render them in its system prompt, expected {tool_text(tool)!r}; "
                "use a template with tools, or write them into the system message"
            )
    matched = list(turns[added:])
    for group, turn in zip(groups, matched, strict=True):
        _check_kept([(message_name(messages, index), messages[index]) for index in group], turn, placeholders)
    return matched


def _check_kept(named: Sequence[tuple[str, Message]], turn: Turn, placeholders: Mapping[str, str]) -> None:
    """Check that a turn has the messages' content in order and no other placeholders; of an assistant, its calls."""
    texts = [message_text(message, placeholders).strip() for _, message in named]
    if named[0][1]["role"] == "assistant":
        calls = message_calls(named[0][1])
        if calls and not turn.content.endswith(tuple(call_texts(calls))):
            expected = _closest(call_texts(calls), turn.content)
            raise VLBridgeError(
                f"{named[0][0]}: the chat template does not render the tool calls in a known form: "
                f"{_difference(expected, turn.content[-len(expected) :])}; use a template with tools"
            )
        return
    position = 0
    for (name, _), text in zip(named, texts, strict=True):
        start = turn.content.find(text, position)
        marks = (sum(one.count(mark) for one in texts) == turn.content.count(mark) for mark in placeholders.values())
        if start < 0 or not all(marks):
            raise VLBridgeError(
                f"{name}: the chat template changes the text: {_difference(text, turn.content[position:])}"
            )
        position = start + len(text)


@lru_cache(maxsize=16)
def generation_prompts(processor: ConversationProcessor) -> tuple[GenerationPrompt, ...]:
    """All generation prompts of the processor's chat template, longest first."""
    question, turns = [{"role": "user", "content": "x"}], processor.turn_format
    variants = processor.prompt_variables
    texts = {render(question, processor, add_generation_prompt=True, **variables) for variables in variants}
    prompts = {text[max(text.rfind(start) for start in turns.starts) :] for text in texts}
    if not all(prompt.startswith(turns.assistant) for prompt in prompts):
        raise VLBridgeError(
            f"expected the chat template's generation prompts to begin with {turns.assistant!r}, found "
            f"{sorted(prompts)}"
        )
    encode = processor.tokenizer.encode
    found = [
        GenerationPrompt(prompt, encode(prompt, add_special_tokens=False), prompt.removeprefix(turns.assistant))
        for prompt in prompts
    ]
    return tuple(sorted(found, key=lambda prompt: len(prompt.ids), reverse=True))


def supervised_spans(
    ids: Tensor,
    turns: Sequence[Turn],
    messages: Conversation,
    processor: ConversationProcessor,
    skipped: Sequence[int] = (),
) -> tuple[dict[int, slice], tuple[ExcludedTurn, ...]]:
    """The supervised tokens of each message, its content and the end token, by its index; and the turns without loss.

    `ids` int64 `[L]` are the tokens of the rendered conversation, placeholders expanded; `turns` has one turn for each
    of `turn_groups(messages)`. `skipped` messages are not learned.
    """
    prompts, tokens = generation_prompts(processor), ids.numpy()
    form = processor.turn_format
    excluded: list[ExcludedTurn] = []
    candidates: list[tuple[int, GenerationPrompt, slice]] = []
    spans = _turn_spans(tokens, len(turns), processor)
    for (index, *_), turn, (start, end) in zip(turn_groups(messages), turns, spans, strict=True):
        if messages[index]["role"] == "assistant" and index not in skipped:
            prompt = next((one for one in prompts if tokens[start : start + len(one.ids)].tolist() == one.ids), None)
            if prompt:
                candidates.append((index, prompt, slice(start + len(prompt.ids), end + 1)))
            else:
                reason = _prompt_mismatch(_assistant_texts(messages[index]), turn, prompts, form.assistant)
                excluded.append(ExcludedTurn(index, reason))
    learned: dict[int, slice] = {}
    decoded = token_texts([tokens[span][:-1] for _, _, span in candidates], processor.tokenizer)
    for (index, prompt, span), found in zip(candidates, decoded, strict=True):
        texts = _assistant_texts(messages[index])
        if any(found in (text, text.removeprefix(prompt.prefix)) for text in texts):
            learned[index] = span
        else:
            excluded.append(ExcludedTurn(index, _difference(_closest(texts, found), found)))
    return learned, tuple(sorted(excluded, key=lambda turn: turn.message))


def _assistant_texts(message: Message) -> list[str]:
    """What a template may render for an assistant message: its reasoning, content and calls, nothing else."""
    text, reasoning = message_text(message, {}), message.get("reasoning_content")
    text = f"<think>\n{reasoning}\n</think>\n\n{text}" if reasoning else text
    calls = message_calls(message)
    between = ("", "\n", "\n\n") if text else ("",)
    return [f"{text}{white}{form}" for form in call_texts(calls) for white in between] if calls else [text]


def _closest(texts: Sequence[str], found: str) -> str:
    """The text that has the longest start in common with the one found."""
    return max(texts, key=lambda text: _first_difference(text, found))


def with_newlines(spans: Mapping[int, slice], ids: Tensor, processor: ConversationProcessor) -> dict[int, slice]:
    """The spans of `supervised_spans`, each with the newline after it.

    Raises VLBridgeError: there is another token.
    """
    newline = processor.tokenizer.encode("\n", add_special_tokens=False)
    for end in (span.stop for span in spans.values()):
        after = ids[end : end + 1].tolist()
        if after != newline:
            found = processor.tokenizer.decode(after)
            raise VLBridgeError(
                f"token {end}: expected a newline after {processor.turn_format.end}, found {found!r}; leave out "
                "--label-newline, the chat template does not write one"
            )
    return {message: slice(span.start, span.stop + 1) for message, span in spans.items()}


def _turn_spans(ids: NDArray[np.int64], count: int, processor: ConversationProcessor) -> list[tuple[int, int]]:
    """Index of the first and the last token of each of the last `count` turns."""
    turns, to_id = processor.turn_format, processor.tokenizer.convert_tokens_to_ids
    starts, ends = (
        np.flatnonzero(np.logical_or.reduce([ids == to_id(token) for token in tokens])).tolist()
        for tokens in (turns.starts, [turns.end])
    )
    if len(starts) != len(ends) or len(starts) - count not in (0, 1):
        raise VLBridgeError(
            f"expected the tokens of {count} turns and at most one system prompt, found {len(starts)} "
            f"{' or '.join(turns.starts)} and {len(ends)} {turns.end}"
        )
    return list(zip(starts, ends, strict=True))[-count:]


def _prompt_mismatch(texts: Sequence[str], turn: Turn, prompts: Sequence[GenerationPrompt], header: str) -> str:
    """Why the tokens of a turn start with none of the generation prompts."""
    text = _closest(texts, turn.content)
    if turn.content != text:
        return _difference(text, turn.content)
    prompt = next((prompt.text for prompt in prompts if f"{header}{text}".startswith(prompt.text)), None)
    if prompt:
        return (
            f"the tokenizer merges the newline at the end of the generation prompt {prompt!r} with the text after it, "
            f"{f'{header}{text}'.removeprefix(prompt)[:MAX_EXCERPT]!r}, a token that the model can never generate here"
        )
    return f"{text[:MAX_EXCERPT]!r} starts with none of the template's generation prompts, {[p.text for p in prompts]}"


def _difference(expected: str, found: str) -> str:
    """Excerpts of both texts, starting shortly before the first difference."""
    start = max(0, _first_difference(expected, found) - MAX_EXCERPT // 3)
    excerpts = _excerpt(expected, start), _excerpt(found, start)
    composed = unicodedata.normalize("NFC", expected)
    if composed.endswith(found) and not expected.endswith(found):
        return (
            f"expected {excerpts[0]!a}, found {excerpts[1]!a}: the tokenizer normalizes to NFC, write the text in NFC"
        )
    return f"expected {excerpts[0]!r}, found {excerpts[1]!r}"


def _first_difference(one: str, other: str) -> int:
    """The length of the longest start that both have."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _excerpt(text: str, start: int) -> str:
    end = start + MAX_EXCERPT
    return f"{'...' if start else ''}{text[start:end]}{'...' if text[end:] else ''}"


def _text_outside_turns(where: str, text: str) -> VLBridgeError:
    return VLBridgeError(f"the chat template adds {text[:MAX_EXCERPT]!r} {where}; expected only whitespace there")
