"""Conversations from a file of JSON lines."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_vlbridge.data.images import is_url
from megatron_vlbridge.data.media import Conversation, Message
from megatron_vlbridge.data.messages import MEDIA_FORM, check_conversation, check_keys, message_name, message_parts
from megatron_vlbridge.errors import VLBridgeError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How other formats mark the place of an image in a text, as in `<image>`, `<image_1>`, `<|video_2|>`, `<img>`. After a
# backtick it is code.
MEDIA_TAG = re.compile(r"(?<!`)<\|?(image|video|audio|img)(?:[ _-]?\d+)?\|?>")
# What names a file between a tag and its closing tag, as in `<video>a.mp4</video>`.
SOURCE = re.compile(r"[^<>]*\.\w+\s*|\s*[^\s<>]*/[^\s<>]*\s*")


class LocatedConversation(list[Message]):
    """A conversation that knows where it was read: `place` is, say, "train.jsonl, line 7"."""

    def __init__(self, messages: Iterable[Message], place: str) -> None:
        super().__init__(messages)
        self.place = place


def read_conversations(path: str | Path, *, split: str = "", literal_tags: bool = False) -> list[Conversation]:
    """The conversations of a JSONL file: on each line `{"messages": [...]}`, as `chat.encode_conversation` takes them.

    Paths of images and of frames are relative to the file's folder. Blank lines and a byte order mark are skipped.
    Every conversation keeps its place, file and line, for the errors of those that encode it.

    Args:
        path: the file, in UTF-8.
        split: what errors name beside the file, as in "train" or "validation".
        literal_tags: take `<image>` and the like in texts literally. Without it they are refused: in files converted
            from other formats they stand for media that are named elsewhere, and the text would be trained on instead.
            A tag after a backtick, and markup between a tag and its closing tag (`<video>...</video>`, but not
            `<video>a.mp4</video>`), are always taken literally.

    Raises:
        VLBridgeError: the file is missing, not UTF-8 or has no conversation; a line is not of this form, has a key
            that is not known or one key twice. File and line (from 1) are named, message and part (from 0).

    Example line::

        {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text":
        "Who?"}]},
                      {"role": "assistant", "content": "A cat."}]}
    """
    path = Path(path)
    name = f"{split} data {path}" if split else str(path)
    conversations: list[Conversation] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                content = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).removesuffix(b"\n")
                if content.strip():
                    place = f"{name}, line {number}"
                    conversations.append(_read_line(content, place, path.parent, literal_tags))
    except OSError as error:
        raise VLBridgeError(f"{name}: no file that can be read ({error.strerror})") from error
    if not conversations:
        raise VLBridgeError(f"{name}: expected at least one conversation, found none")
    return conversations


def _read_line(line: bytes, place: str, folder: Path, literal_tags: bool) -> LocatedConversation:
    try:
        messages = _messages(_parsed(line))
        check_conversation(messages)
        if not literal_tags:
            _check_tags(messages)
    except VLBridgeError as error:
        raise VLBridgeError(f"{place}: {error}") from error
    resolved = [{**message, "content": _resolved(message["content"], folder)} for message in messages]
    return LocatedConversation(resolved, place)


def _parsed(line: bytes) -> Any:
    """The value of a line. Python's parser keeps the last of two equal keys and reads NaN; both are refused here."""
    try:
        return json.loads(
            line.decode(), object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite, parse_int=_integer
        )
    except UnicodeDecodeError as error:
        raise VLBridgeError(f"expected UTF-8 text, found {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise VLBridgeError(
            f"expected one JSON object on the line, found {line.strip()[:80].decode(errors='replace')!r} "
            f"(column {error.colno}: {error.msg})"
        ) from error
    except RecursionError:
        raise VLBridgeError("expected one JSON object on the line, found too many levels of nesting") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise VLBridgeError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return value


def _refuse(constant: str) -> None:
    raise VLBridgeError(f"{constant} is not a JSON value")


def _finite(digits: str) -> float:
    if math.isinf(float(digits)):
        raise VLBridgeError(f"{digits[:80]} is too large for a number")
    return float(digits)


def _integer(digits: str) -> int:
    _finite(digits)  # Python reads no integer of more than 4300 digits
    return int(digits)


def _messages(value: object) -> Any:
    if not isinstance(value, dict):
        raise VLBridgeError(f'expected {{"messages": [...]}}, found {type(value).__name__} {str(value)[:80]!r}')
    if "messages" not in value:
        raise VLBridgeError(
            f'expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}, found the keys {sorted(value)}'
        )
    check_keys("the line", value, ("messages",))
    return value["messages"]


def _check_tags(messages: Conversation) -> None:
    for index, message in enumerate(messages):
        text = "".join(part["text"] for part in message_parts(message) if part["type"] == "text")
        for tag in MEDIA_TAG.finditer(text):
            if _stands_for_media(tag):
                raise VLBridgeError(
                    f"{message_name(messages, index)}: the text holds {tag[0]!r}, which would be trained on as text; "
                    f"expected {MEDIA_FORM}; if it is meant as text: --literal-tags, or read_conversations(..., "
                    "literal_tags=True)"
                )


def _stands_for_media(tag: re.Match[str]) -> bool:
    """Whether a tag is no markup: `<img>` never has content, and what closes has markup in it, not a file's name."""
    end = tag.string.find(f"</{tag[1]}>", tag.end())
    return tag[1] == "img" or end < 0 or SOURCE.fullmatch(tag.string, tag.end(), end) is not None


def _resolved(content: Any, folder: Path) -> Any:
    """The content with its paths made independent of the working directory."""
    if isinstance(content, str):
        return content
    return [
        {key: _resolved_path(value, folder) if key in ("image", "video") else value for key, value in part.items()}
        for part in content
    ]


def _resolved_path(value: Any, folder: Path) -> Any:
    """Lists item by item. What is no path stays as it is, for `media` to refuse it under its own name."""
    if isinstance(value, list):
        return [_resolved_path(item, folder) for item in value]
    return str(folder / value) if isinstance(value, str) and not is_url(value) else value
