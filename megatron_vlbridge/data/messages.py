"""The format of a conversation: allowed keys, roles and content parts. Anything else is rejected by name."""

from collections.abc import Iterable
from typing import Any

from megatron_vlbridge.data.media import CLIP, LIMITS, SAMPLING, VIDEO_LIMITS, Conversation, Message, shown
from megatron_vlbridge.errors import VLBridgeError

ROLES = ("system", "user", "assistant")
PART_KEYS = {
    "text": ("text",),
    "image": ("image", *LIMITS),
    "video": ("video", *SAMPLING, *VIDEO_LIMITS, *CLIP),
}

MEDIA_FORM = (
    '{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]}, '
    "each image and video as a content part, at its position in the text"
)
_MEDIA_HINT = f"expected {MEDIA_FORM}"
_SOURCE_HINT = "write the path under the key named like the type, 'image' or 'video'"
HINTS = {
    **dict.fromkeys(("images", "videos", "image", "video"), _MEDIA_HINT),
    **dict.fromkeys(("audio", "audios"), "audio is not supported"),
    **dict.fromkeys(("url", "path", "image_url", "image_path", "video_path", "video_url"), _SOURCE_HINT),
    **dict.fromkeys(("tools", "tool_calls", "function_call", "tool_call_id"), "tools are not supported"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        r"write the reasoning at the start of the content, as '<think>\n...\n</think>\n\n...'",
    ),
    **dict.fromkeys(("system", "system_prompt"), 'expected {"role": "system", "content": ...} as the first message'),
    **dict.fromkeys(("from", "value"), "expected 'role' and 'content'"),
}


def check_keys(where: str, found: Iterable[object], expected: Iterable[str]) -> None:
    """Reject unexpected keys by name, with what to write instead."""
    expected = tuple(expected)
    unknown = [key for key in found if key not in expected]
    if unknown:
        hints = [HINTS[str(key)] for key in unknown if str(key) in HINTS]
        remedy = "; ".join(dict.fromkeys(hints)) or "it would have no effect, remove it"
        raise VLBridgeError(
            f"{where}: unknown key {', '.join(map(repr, unknown))} (known: {', '.join(map(repr, expected))}): {remedy}"
        )


def check_conversation(messages: object) -> None:
    """Check the format of all messages and parts, but not the media.

    Raises VLBridgeError: a message does not have the format that `chat.encode_conversation` describes. The error names
    the message and the part by index, from 0.
    """
    if not isinstance(messages, list | tuple):
        raise VLBridgeError(f"expected a list of messages, found {shown(messages)}")
    if not messages:
        raise VLBridgeError("expected a conversation of at least one message, found none")
    for index, message in enumerate(messages):
        _check_message(index, message)


def message_parts(message: Message) -> list[dict[str, Any]]:
    """The content parts of a validated message; a string is one text part."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def message_text(message: Message, placeholders: dict[str, str]) -> str:
    """The text of a validated message, joined as chat templates do, with a placeholder for each image and video."""
    return "".join(
        part["text"] if part["type"] == "text" else placeholders[part["type"]] for part in message_parts(message)
    )


def message_name(messages: Conversation, index: int) -> str:
    """The name of a message in errors."""
    return f"message {index} ({messages[index]['role']})"


def _check_message(index: int, message: object) -> None:
    if not isinstance(message, dict):
        raise VLBridgeError(f"message {index}: expected an object with 'role' and 'content', found {shown(message)}")
    check_keys(f"message {index}", message, ("role", "content"))
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise VLBridgeError(f"message {index}: expected 'role' to be one of {', '.join(ROLES)}, found {shown(role)}")
    name = f"message {index} ({role})"
    if isinstance(content, str):
        _check_text(name, content)
    elif isinstance(content, list) and content:
        for part_index, part in enumerate(content):
            _check_part(f"{name}, part {part_index}", part, role)
    else:
        raise VLBridgeError(
            f"{name}: expected 'content' to be a string or a list of at least one part, found {shown(content)}"
        )


def _check_part(name: str, part: object, role: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in PART_KEYS:
        raise VLBridgeError(f"{name}: expected an object of type text, image or video, found {shown(part)}")
    check_keys(f"{name}, {kind}", part, ("type", *PART_KEYS[kind]))
    if kind == "text":
        _check_text(name, part.get("text"))
    elif role != "user":
        raise VLBridgeError(f"{name}: expected text, found {kind}: only user messages may contain images and videos")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise VLBridgeError(f"{name}: expected a string under 'text', found {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VLBridgeError(
            f"{name}: expected Unicode text, found a lone surrogate, {text[error.start]!a}, at character {error.start}"
        ) from None
