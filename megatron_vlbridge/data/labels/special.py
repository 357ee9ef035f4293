"""Special tokens in the texts of a conversation: they are found, and stand aside while a chat template is applied.

A character from a private area of Unicode that the conversation does not contain stands for each special token of the
texts. So the special tokens of the rendered text are those of the template alone. The text is tokenized in the pieces
between these characters; the tokens that they stand for are tokenized as plain text, as `sanitize_control_tokens` of
transformers 5.23 does.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_vlbridge.data.media import Conversation, Message
from megatron_vlbridge.data.messages import message_name, message_parts, message_text
from megatron_vlbridge.errors import VLBridgeError

JSON_KEYS = ("reasoning_content", "tool_calls")
PRIVATE = range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)


def check_special_tokens(
    messages: Conversation, tools: Sequence[Any], special_tokens: Sequence[str], remedy: str
) -> None:
    """Check that no text of the messages and tools contains a special token.

    Raises VLBridgeError: with the name of the message, the tokens, and the remedy.
    """
    for index, message in enumerate(messages):
        # Concatenated as by the template: two parts can form a special token together.
        texts = [message_text(message, {"image": "\n", "video": "\n"}), *_json_texts(list(map(message.get, JSON_KEYS)))]
        _reject(message_name(messages, index), texts, special_tokens, remedy)
    _reject("tools", _json_texts(tools), special_tokens, remedy)


def hide_special_tokens(
    messages: Conversation, tools: list[Any], special_tokens: Sequence[str]
) -> tuple[Conversation, list[Any], dict[str, str]]:
    r"""The messages and tools with a character instead of each special token, and the token of each character.

    Example: the content "say <|im_end|>" becomes "say \ue000", and the third value `{"\ue000": "<|im_end|>"}`.
    """
    texts = list(chain(_json_texts(tools), *map(_texts, messages)))
    found = [token for token in special_tokens if any(token in text for text in texts)]
    if not found:
        return messages, tools, {}
    used = set[str]().union(*texts)
    free = (chr(code) for code in chain(*PRIVATE) if chr(code) not in used)
    marks = dict(zip(found, free, strict=False))
    # Longer ones first: a token may contain another.
    pattern = re.compile("|".join(re.escape(token) for token in sorted(marks, key=len, reverse=True)))

    def hide(text: str) -> str:
        return pattern.sub(lambda match: marks[match[0]], text)

    hidden = [_map_message(message, hide) for message in messages]
    return hidden, _map_json(tools, hide), {mark: token for token, mark in marks.items()}


def shown_tokens(text: str, tokens: Mapping[str, str]) -> str:
    """The text with the special tokens that `hide_special_tokens` replaced."""
    return text.translate({ord(mark): token for mark, token in tokens.items()})


def split_hidden(text: str, tokens: Mapping[str, str]) -> list[str]:
    """The pieces of a text between and at the characters of `tokens`, in order."""
    return [piece for piece in re.split(f"([{''.join(tokens)}])", text) if piece] if tokens else [text]


def plain_ids(token: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a special token as plain text (VLBridgeError if the tokenizer gives the special token itself)."""
    ids: list[int] = tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
    if tokenizer.convert_tokens_to_ids(token) in ids:
        raise VLBridgeError(f"tokenizer: it cannot encode {token!r} as plain text; remove it from the texts")
    return ids


def _reject(name: str, texts: Sequence[str] | Iterator[str], special_tokens: Sequence[str], remedy: str) -> None:
    texts = list(texts)
    found = [token for token in special_tokens if any(token in text for text in texts)]
    if found:
        raise VLBridgeError(f"{name}: the text contains the special tokens {', '.join(map(repr, found))}; {remedy}")


def _texts(message: Message) -> Iterator[str]:
    yield from (part["text"] for part in message_parts(message) if part["type"] == "text")
    yield from _json_texts([message.get(key) for key in JSON_KEYS])


def _json_texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_json_texts, chain(value, value.values())))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_json_texts, value))


def _map_message(message: Message, change: Callable[[str], str]) -> Message:
    """The message with its texts changed; paths and frames stay."""
    changed = {key: _map_json(value, change) if key in JSON_KEYS else value for key, value in message.items()}
    if isinstance(message["content"], str):
        return {**changed, "content": change(message["content"])}
    parts = [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in message["content"]]
    return {**changed, "content": parts}


def _map_json(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_json(key, change): _map_json(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_map_json(one, change) for one in value]
    return value
