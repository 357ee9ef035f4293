"""Read conversations from a JSON Lines file."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_vlbridge.data.images import is_url
from megatron_vlbridge.data.labels.tools import check_tools
from megatron_vlbridge.data.media import Conversation, Message, shown
from megatron_vlbridge.data.messages import MEDIA_FORM, check_conversation, check_keys, message_name, message_parts
from megatron_vlbridge.errors import VLBridgeError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Media placeholders of other formats, such as `<image>`, `<image_1>`, `<|video_2|>`, `<img>`. After a backtick the tag
# is code.
MEDIA_TAG = re.compile(r"(?<!`)<\|?(image|video|audio|img)(?:[ _-]?\d+)?\|?>")
# A file name between a tag and its closing tag, as in `<video>a.mp4</video>`.
SOURCE = re.compile(r"[^<>]*\.\w+\s*|\s*[^\s<>]*/[^\s<>]*\s*")


class FileConversation(list[Message]):
    """A conversation read from a file, its tools, and its location for error messages, e.g. "train.jsonl, line 7"."""

    def __init__(self, messages: Iterable[Message], location: str, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(messages)
        self.location = location
        self.tools = tools


def read_conversations(path: str | Path, *, split: str = "", literal_tags: bool = False) -> list[Conversation]:
    """Read a JSONL file (UTF-8) with `{"messages": [...]}` on each line, in the format of `chat.encode_conversation`.

    A line may also have `"tools": [...]`, those of the conversation.
    Paths of images and frames are relative to the folder of the file. Blank lines and a byte order mark are skipped.
    Every conversation keeps its file and line, so that errors raised when it is encoded can name them.

    `split`, such as "train" or "validation", is named in errors. With `literal_tags`, `<image>` and similar tags in
    texts are plain text. By default they are rejected: in files converted from other formats they are placeholders for
    media listed elsewhere, and the model would be trained on the tag. A tag after a backtick, and markup between a tag
    and its closing tag (`<video>...</video>`, but not `<video>a.mp4</video>`), are always plain text.

    Raises VLBridgeError: the file is missing, not UTF-8 or has no conversation; a line does not have this format, has
    an unknown key or a duplicate key. The error names file and line (from 1), message and part (from 0).

    Example line: `{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]}`.
    """
    path = Path(path)
    name = f"{split} data {path}" if split else str(path)
    conversations: list[Conversation] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                content = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).removesuffix(b"\n")
                if content.strip():
                    location = f"{name}, line {number}"
                    conversations.append(_read_line(content, location, path.parent, literal_tags))
    except OSError as error:
        raise VLBridgeError(f"{name}: cannot read the file ({error.strerror})") from error
    if not conversations:
        raise VLBridgeError(f"{name}: expected at least one conversation, found none")
    return conversations


def _read_line(line: bytes, location: str, folder: Path, literal_tags: bool) -> FileConversation:
    try:
        value = _parse_json(line)
        messages = _messages(value)
        check_conversation(messages)
        tools = [] if value.get("tools") is None else value["tools"]
        check_tools(tools)
        if not literal_tags:
            _check_tags(messages)
    except VLBridgeError as error:
        raise VLBridgeError(f"{location}: {error}") from error
    resolved = [{**message, "content": _resolve_paths(message.get("content"), folder)} for message in messages]
    return FileConversation(resolved, location, tools)


def _parse_json(line: bytes) -> Any:
    """Parse a line. Python's parser keeps the last of duplicate keys and accepts NaN; both are errors here."""
    try:
        return json.loads(
            line.decode(),
            object_pairs_hook=_object,
            parse_constant=_reject_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise VLBridgeError(f"expected UTF-8 text, found {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise VLBridgeError(
            f"expected one JSON object on the line, found {line.strip()[:80].decode(errors='replace')!r} "
            f"(column {error.colno}: {error.msg})"
        ) from error
    except RecursionError:
        raise VLBridgeError("expected one JSON object on the line, found too many nesting levels") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise VLBridgeError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return value


def _reject_constant(constant: str) -> None:
    raise VLBridgeError(f"{constant} is not a JSON value")


def _finite(digits: str) -> float:
    if math.isinf(float(digits)):
        raise VLBridgeError(f"{digits[:80]} is too large")
    return float(digits)


def _integer(digits: str) -> int:
    _finite(digits)  # Python parses integers of at most 4300 digits
    return int(digits)


def _messages(value: object) -> Any:
    if not isinstance(value, dict):
        raise VLBridgeError(f'expected {{"messages": [...]}}, found {shown(value)}')
    if "messages" not in value:
        raise VLBridgeError(
            f'expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}, found the keys {sorted(value)}'
        )
    check_keys("the line", value, ("messages", "tools"))
    return value["messages"]


def _check_tags(messages: Conversation) -> None:
    for index, message in enumerate(messages):
        text = "".join(part["text"] for part in message_parts(message) if part["type"] == "text")
        text = f"{message.get('reasoning_content') or ''}\n{text}"
        for tag in MEDIA_TAG.finditer(text):
            # `<img>`, a tag that is not closed, or one around a file name.
            end = text.find(f"</{tag[1]}>", tag.end())
            if tag[1] == "img" or end < 0 or SOURCE.fullmatch(text, tag.end(), end):
                raise VLBridgeError(
                    f"{message_name(messages, index)}: the text contains {tag[0]!r}, which would be trained on as "
                    f"text; expected {MEDIA_FORM}; if it is plain text, use --literal-tags or "
                    "read_conversations(..., literal_tags=True)"
                )


def _resolve_paths(content: Any, folder: Path) -> Any:
    """The content with its paths joined to the folder of the file."""
    if isinstance(content, str | None):
        return content
    return [
        {key: _resolve_path(value, folder) if key in ("image", "video") else value for key, value in part.items()}
        for part in content
    ]


def _resolve_path(value: Any, folder: Path) -> Any:
    """Resolve a path or a list of paths. Other values stay unchanged: `media` rejects them by name."""
    if isinstance(value, list):
        return [_resolve_path(item, folder) for item in value]
    return str(folder / value) if isinstance(value, str) and not is_url(value) else value
