r"""What a conversation's loss covers, read from the turns that the chat template wrote.

A turn is `<|im_start|>`, the role and a line break, content, `<|im_end|>`. At inference a model starts to speak after
the template's generation prompt: `<|im_start|>assistant\n`, and for thinking models also `<think>\n` or
`<think>\n\n</think>\n\n`. So of an assistant's turn the tokens after the longest such prompt are learned, and only if
they decode to exactly what the message says. Templates change messages (they drop the reasoning of earlier turns, add
an empty one, strip white space); a turn that was changed is not learned.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import ProcessorMixin

from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.messages import message_name, message_text
from megatron_vlbridge.errors import VLBridgeError

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
HEADER = f"{TURN_START}assistant\n"
SHOWN = 60  # characters of a text that errors show


@dataclass(frozen=True)
class Turn:
    """A turn as the template wrote it: the text between its header and its end."""

    role: str
    content: str


@dataclass(frozen=True)
class UnlearnedTurn:
    """An assistant's message that has no loss, by its index, and why."""

    message: int
    reason: str


@dataclass(frozen=True)
class GenerationPrompt:
    """What stands before the first token that the model says: text and token ids."""

    text: str
    ids: list[int]

    @property
    def given(self) -> str:
        r"""What the model need not say itself, as `<think>\n`, where a message begins with it."""
        return self.text.removeprefix(HEADER)


def render(messages: Conversation, processor: ProcessorMixin, **variables: Any) -> str:
    """The conversation as the processor's chat template writes it (VLBridgeError where the template refuses it)."""
    try:
        return processor.apply_chat_template(messages, tokenize=False, **variables)
    except (TemplateError, TypeError, ValueError) as error:
        raise VLBridgeError(f"the chat template refuses the conversation: {error}") from error


def split_turns(text: str) -> list[Turn]:
    r"""The turns of a rendered conversation, with nothing but white space between them.

    Example:
        >>> split_turns("<|im_start|>user\nWho?<|im_end|>\n")
        [Turn(role='user', content='Who?')]
    """
    before, *pieces = text.split(TURN_START)
    turns: list[Turn] = []
    between = before
    for index, piece in enumerate(pieces):
        if between.strip():
            raise _foreign_text(f"before turn {index}", between)
        turn, end, between = piece.partition(TURN_END)
        role, line_break, content = turn.partition("\n")
        if not end or not line_break:
            raise VLBridgeError(
                f"turn {index}: expected a role, a line break, content and {TURN_END}, found {piece[:SHOWN]!r}; the "
                "chat template does not have the Qwen form"
            )
        turns.append(Turn(role, content))
    if between.strip():
        raise _foreign_text("after the last turn", between)
    return turns


def match_turns(turns: Sequence[Turn], messages: Conversation, placeholders: dict[str, str]) -> list[Turn]:
    """The turn of each message, after a check that the template has kept what system and users say.

    The template may begin with a system prompt of its own. It may add to the texts and strip white space from their
    ends, as the published templates do. What it does to the assistants' texts is left to `learned_mask`.

    Raises:
        VLBridgeError: a message has no turn or a turn no message; a text was changed, or an image or video left out.
    """
    roles, found = [message["role"] for message in messages], [turn.role for turn in turns]
    added = 1 if found[:1] == ["system"] and roles[0] != "system" else 0
    if found[added:] != roles:
        raise VLBridgeError(
            f"expected one turn for each of the {len(messages)} messages ({', '.join(roles)}), but the chat template "
            f"made {len(turns)} ({', '.join(found) or 'none'})"
        )
    own = list(turns[added:])
    for index, (message, turn) in enumerate(zip(messages, own, strict=True)):
        expected = message_text(message, placeholders).strip()
        if message["role"] != "assistant" and not _is_kept(expected, turn.content, placeholders):
            raise VLBridgeError(
                f"{message_name(messages, index)}: the chat template changes the text: "
                f"{_difference(expected, turn.content)}"
            )
    return own


def _is_kept(expected: str, found: str, placeholders: dict[str, str]) -> bool:
    return expected in found and all(expected.count(mark) == found.count(mark) for mark in placeholders.values())


def generation_prompts(processor: ProcessorMixin) -> list[GenerationPrompt]:
    """All generation prompts of the processor's chat template, longest first."""
    template = processor.chat_template
    template = template.get("default", "") if isinstance(template, dict) else template
    variants: list[dict[str, bool]] = [{}]
    if "enable_thinking" in (template or ""):
        variants += [{"enable_thinking": True}, {"enable_thinking": False}]
    question = [{"role": "user", "content": "x"}]
    texts = {render(question, processor, add_generation_prompt=True, **variables) for variables in variants}
    prompts = {text[text.rindex(TURN_START) :] for text in texts}
    if not all(prompt.startswith(HEADER) for prompt in prompts):
        raise VLBridgeError(
            f"expected the chat template's generation prompts to begin with {HEADER!r}, found {sorted(prompts)}"
        )
    encode = processor.tokenizer.encode
    found = [GenerationPrompt(prompt, encode(prompt, add_special_tokens=False)) for prompt in prompts]
    return sorted(found, key=lambda prompt: len(prompt.ids), reverse=True)


def learned_mask(
    ids: Tensor, turns: Sequence[Turn], messages: Conversation, processor: ProcessorMixin
) -> tuple[Tensor, tuple[UnlearnedTurn, ...]]:
    """Bool `[L]`, True for a token to learn: what an assistant says and its `<|im_end|>`; and the turns left out.

    Args:
        ids: int64 `[L]`, the tokens of the rendered conversation, placeholders expanded.
        turns: the turn of each message.
        messages: the conversation.
        processor: with the chat template and the tokenizer.
    """
    prompts, tokens = generation_prompts(processor), ids.tolist()
    unlearned: list[UnlearnedTurn] = []
    prompted: list[tuple[int, GenerationPrompt, slice]] = []
    for index, (start, end) in enumerate(_turn_spans(ids, len(messages), processor.tokenizer)):
        if messages[index]["role"] == "assistant":
            prompt = next((one for one in prompts if tokens[start : start + len(one.ids)] == one.ids), None)
            if prompt:
                prompted.append((index, prompt, slice(start + len(prompt.ids), end + 1)))
            else:
                reason = _why_not_prompted(message_text(messages[index], {}), turns[index], prompts)
                unlearned.append(UnlearnedTurn(index, reason))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    spoken = _spoken([tokens[span] for _, _, span in prompted], processor.tokenizer)
    for (index, prompt, span), said in zip(prompted, spoken, strict=True):
        text = message_text(messages[index], {})
        if said in (text, text.removeprefix(prompt.given)):
            mask[span] = True
        else:
            unlearned.append(UnlearnedTurn(index, _difference(text, said)))
    return mask, tuple(sorted(unlearned, key=lambda turn: turn.message))


def _turn_spans(ids: Tensor, count: int, tokenizer: Any) -> list[tuple[int, int]]:
    """First and last token of the last `count` turns."""
    starts, ends = (
        (ids == tokenizer.convert_tokens_to_ids(token)).nonzero().flatten().tolist() for token in (TURN_START, TURN_END)
    )
    if len(starts) != len(ends) or len(starts) - count not in (0, 1):
        raise VLBridgeError(
            f"expected the tokens of {count} turns and at most one system prompt, found {len(starts)} {TURN_START} "
            f"and {len(ends)} {TURN_END}"
        )
    return list(zip(starts, ends, strict=True))[-count:]


def _spoken(pieces: list[list[int]], tokenizer: Any) -> list[str]:
    """The text of each piece without its `<|im_end|>`. Decoding all at once is several times as fast as each."""
    text = tokenizer.decode([token for piece in pieces for token in piece], clean_up_tokenization_spaces=False)
    return text.split(TURN_END)[:-1]


def _why_not_prompted(text: str, turn: Turn, prompts: Sequence[GenerationPrompt]) -> str:
    """Why the tokens of a turn begin with no generation prompt."""
    if turn.content != text:
        return _difference(text, turn.content)
    written = next((prompt.text for prompt in prompts if f"{HEADER}{text}".startswith(prompt.text)), None)
    if written:
        return (
            f"the tokenizer joins the line break at the end of the generation prompt {written!r} with what follows, "
            f"{f'{HEADER}{text}'.removeprefix(written)[:SHOWN]!r}, which a model can never generate so"
        )
    return f"{text[:SHOWN]!r} follows none of the template's generation prompts, {[p.text for p in prompts]}"


def _difference(expected: str, found: str) -> str:
    """Both texts, from shortly before the place where they begin to differ."""
    pairs = enumerate(zip(expected, found, strict=False))
    first = next((index for index, (one, other) in pairs if one != other), min(len(expected), len(found)))
    start = max(0, first - SHOWN // 3)
    shown = _excerpt(expected, start), _excerpt(found, start)
    composed = unicodedata.normalize("NFC", expected)
    if composed.endswith(found) and not expected.endswith(found):
        return f"expected {shown[0]!a}, found {shown[1]!a}: the tokenizer composes characters, write the text in NFC"
    return f"expected {shown[0]!r}, found {shown[1]!r}"


def _excerpt(text: str, start: int) -> str:
    end = start + SHOWN
    return f"{'...' if start else ''}{text[start:end]}{'...' if text[end:] else ''}"


def _foreign_text(where: str, text: str) -> VLBridgeError:
    return VLBridgeError(
        f"the chat template writes {text[:SHOWN]!r} {where}, outside of all turns; expected white space there"
    )
