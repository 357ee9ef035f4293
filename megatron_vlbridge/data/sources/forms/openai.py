"""The form of OpenAI's chat API: content parts with URLs."""

import base64
import binascii
import re
from typing import Any
from urllib.parse import unquote

from megatron_vlbridge.data.images import is_url
from megatron_vlbridge.data.media import shown
from megatron_vlbridge.data.url_cache import is_http
from megatron_vlbridge.errors import VLBridgeError

type Record = dict[str, Any]

KINDS = {"image_url": "image", "video_url": "video"}
FILE_URL = re.compile(r"file:(?://(?:localhost)?)?((?:(?<=//)|(?!//))/[^?#]*)", re.IGNORECASE)
DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]+);base64,", re.IGNORECASE)


def from_openai(record: Record) -> Record:
    """The messages form of messages with parts such as `{"type": "image_url", "image_url": {"url": "a.png"}}`.

    A URL is a path, `file:///a.png`, or for images `data:image/png;base64,...`, which becomes bytes; those of http and
    https stay as they are (see `images.MediaOptions.url_cache`). Everything else is left for the check of the messages
    form.

    Raises VLBridgeError: another URL, invalid base64, a `detail` other than "auto". The error names message and part.
    Example: `from_openai({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url":
    "file:///a.png"}}]}]})` has the part `{"type": "image", "image": "/a.png"}`.
    """
    messages = record["messages"]
    if not isinstance(messages, list):
        return record
    return {**record, "messages": [_message(index, message) for index, message in enumerate(messages)]}


def _message(index: int, message: Any) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = []
    for place, part in enumerate(message["content"]):
        try:
            parts.append(_part(part))
        except VLBridgeError as error:
            raise VLBridgeError(f"message {index} ({message.get('role')}), part {place}: {error}") from error
    return {**message, "content": parts}


def _part(part: Any) -> Any:
    key = part.get("type") if isinstance(part, dict) else None
    if not isinstance(key, str) or key not in KINDS:
        return part
    rest = {name: value for name, value in part.items() if name not in ("type", key)}
    value = part.get(key)
    if isinstance(value, dict):
        value = dict(value)
        detail = value.pop("detail", "auto")
        if detail != "auto":
            raise VLBridgeError(f"{key}: 'detail' {detail!r} would have no effect; expected none, or 'auto'")
        rest |= {name: value[name] for name in value if name != "url"}
        value = value.get("url")
    if not isinstance(value, str):
        raise VLBridgeError(f'{key}: expected {{"url": ...}}, found {shown(part.get(key))}')
    return {"type": KINDS[key], KINDS[key]: _source(key, value), **rest}


def _source(key: str, url: str) -> str | bytes:
    if key == "image_url" and (start := DATA_URL.match(url)):
        try:
            return base64.b64decode(url[start.end() :], validate=True)
        except binascii.Error as error:
            raise VLBridgeError(f"{key}: expected base64 after {start[0]!r}, found an error: {error}") from error
    if file := FILE_URL.match(url):
        return unquote(file[1])
    if is_url(url) and not is_http(url):
        other = ", or data:image/...;base64,..." if key == "image_url" else ""
        raise VLBridgeError(
            f"{key}: {url[:80]!r} is not supported; download it and write its path, file:///the/path{other}"
        )
    return url
