"""Forms with `<image>` and `<video>` tags in texts and the media in lists: ms-swift, LLaMA-Factory, ShareGPT, LLaVA."""

import re
from collections.abc import Iterator
from typing import Any

from megatron_vlbridge.data.media import shown
from megatron_vlbridge.errors import VLBridgeError

type Record = dict[str, Any]

TAG = re.compile("(<image>|<video>)")
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
TAG_KEYS = ("messages", "images", "videos", "image", "video")
SHAREGPT_KEYS = ("conversations", "system", *TAG_KEYS[1:])


def from_tags(record: Record) -> Record:
    """The messages form of `{"messages": [...], "images": [...], "videos": [...]}` with a tag for each file.

    A tag in a string becomes the next image or video of the list; texts around it are unchanged. An item of a list is a
    source, `{"bytes": ..., "path": ...}`, or the keys of the part, as in `{"video": [...], "fps": 2}`; a list may also
    be under `image` or `video`, or a source alone. Other keys and messages of another form are left for the check.

    Raises VLBridgeError: the numbers of tags and of files differ.
    Example: `from_tags({"messages": [{"role": "user", "content": "<image>Who?"}], "images": ["a.png"]})` is
    `{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text",
    "text": "Who?"}]}]}`.
    """
    media = {kind: _media(record, kind) for kind in ("image", "video")}
    rest = {key: value for key, value in record.items() if key not in TAG_KEYS[1:]}
    messages = record["messages"]
    if not isinstance(messages, list):
        return rest
    texts = [text for message in messages if (text := _text(message)) is not None]
    for kind, files in media.items():
        tags = sum(text.count(f"<{kind}>") for text in texts)
        if tags != len(files):
            lists = [
                message
                for message in messages
                if isinstance(message, dict) and isinstance(message.get("content"), list)
            ]
            hint = "; contents that are lists do not count: write each file there as a part" if lists else ""
            raise VLBridgeError(
                f"expected a tag for each {kind}, found <{kind}> {tags} times in the texts and {len(files)} under "
                f"'{_key(record, kind)}'{hint}"
            )
    left = {kind: iter(files) for kind, files in media.items()}
    return {**rest, "messages": [_with_parts(message, left) for message in messages]}


def from_sharegpt(record: Record) -> Record:
    """The messages form of `{"conversations": [{"from": "human", "value": "<image>Who?"}], "image": "a.png"}`.

    Speakers are human, gpt, system and observation, or our roles. `system` beside the conversations is a first message.

    Raises VLBridgeError: as `from_tags`; a message has other keys than `from` and `value`.
    Example: `from_sharegpt({"conversations": [{"from": "gpt", "value": "A cat."}]})` is
    `{"messages": [{"role": "assistant", "content": "A cat."}]}`.
    """
    rest = {key: value for key, value in record.items() if key not in ("conversations", "system")}
    messages = record["conversations"]
    if isinstance(messages, list):
        messages = [_renamed(index, message) for index, message in enumerate(messages)]
        if record.get("system") not in (None, ""):
            messages.insert(0, {"role": "system", "content": record["system"]})
    return from_tags({**rest, "messages": messages})


def media_part(kind: str, item: Any) -> Record:
    """The content part of an item of a list of media; bytes in a table take precedence over their path."""
    if isinstance(item, dict):
        if kind in item:
            return {"type": kind, **item}
        if item and item.keys() <= {"bytes", "path"}:
            item = item.get("path") if item.get("bytes") is None else item["bytes"]
    return {"type": kind, kind: item}


def _media(record: Record, kind: str) -> list[Any]:
    one, several = record.get(kind), record.get(f"{kind}s")
    if one is not None and several is not None:
        raise VLBridgeError(f"expected the {kind}s under one key, found '{kind}' and '{kind}s'")
    if several is not None and not isinstance(several, list):
        raise VLBridgeError(f"expected a list under '{kind}s', found {shown(several)}")
    if one is None:
        return several or []
    return one if isinstance(one, list) else [one]


def _key(record: Record, kind: str) -> str:
    return kind if record.get(kind) is not None else f"{kind}s"


def _text(message: Any) -> str | None:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else None


def _with_parts(message: Any, left: dict[str, Iterator[Any]]) -> Any:
    text = _text(message)
    if text is None or not TAG.search(text):
        return message
    pieces = [piece for piece in TAG.split(text) if piece]
    parts = [
        media_part(piece[1:-1], next(left[piece[1:-1]])) if TAG.fullmatch(piece) else {"type": "text", "text": piece}
        for piece in pieces
    ]
    return {**message, "content": parts}


def _renamed(index: int, message: Any) -> Any:
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        found = sorted(message) if isinstance(message, dict) else shown(message)
        raise VLBridgeError(f"message {index}: expected the keys 'from' and 'value', found {found}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker = message["from"]
    role = ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": message["value"], **rest}
