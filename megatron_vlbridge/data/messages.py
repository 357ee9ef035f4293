"""The format of a conversation: allowed keys, roles and content parts. Anything else is rejected by name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_vlbridge.data.labels.tools import Call, read_calls
from megatron_vlbridge.data.media import CLIP, LIMITS, SAMPLING, VIDEO_LIMITS, Conversation, Message, shown
from megatron_vlbridge.errors import VLBridgeError

# The keys of a message beside "role" and "content".
MESSAGE_KEYS: dict[str, tuple[str, ...]] = {
    "system": (),
    "user": (),
    "assistant": ("reasoning_content", "tool_calls", "train", "weight"),
    "tool": ("tool_call_id", "name"),
}
ROLES = tuple(MESSAGE_KEYS)
WEIGHTS = 0.001, 1000  # the smallest and the largest weight of a learned message
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
    "train": 'only assistant messages are learned, and have "train": false',
    "weight": 'only assistant messages are learned, and have a "weight"',
    "loss": 'write "train": false in a message that is not learned, and nothing in the others',
    "loss_scale": 'write the weight of its losses as "weight"',
    "tools": "write the tools beside the messages, not in one of them",
    **dict.fromkeys(("tool_calls", "function_call"), "calls are written in assistant messages, under 'tool_calls'"),
    "tool_call_id": "results of calls are written in messages of the role 'tool'",
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "write the reasoning in assistant messages, under 'reasoning_content'",
    ),
    **dict.fromkeys(("system", "system_prompt"), 'expected {"role": "system", "content": ...} as the first message'),
    **dict.fromkeys(("from", "value"), "expected 'role' and 'content'"),
}


def check_keys(
    where: str,
    found: Iterable[object],
    expected: Iterable[str],
    *,
    hints: Mapping[str, str] = HINTS,
    otherwise: str = "it would have no effect, remove it",
) -> None:
    """Reject unexpected keys by name, with what to write instead: from `hints`, or `otherwise`."""
    expected = tuple(expected)
    unknown = [key for key in found if key not in expected]
    if unknown:
        remedy = "; ".join(dict.fromkeys(hints.get(str(key), otherwise) for key in unknown))
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
    calls: list[Call] = []  # those whose results have not come yet
    for index, message in enumerate(messages):
        _check_message(index, message)
        if message["role"] == "tool":
            _check_result(index, message, calls)
            calls = calls[1:]
        else:
            calls = message_calls(message)


def message_parts(message: Message) -> list[dict[str, Any]]:
    """The content parts of a validated message; a string is one text part, None none."""
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def message_calls(message: Message) -> list[Call]:
    """The tool calls of a message."""
    return read_calls("message", message.get("tool_calls"))


def message_text(message: Message, placeholders: Mapping[str, str]) -> str:
    """The text of a validated message, joined as chat templates do, with a placeholder for each image and video."""
    if isinstance(message.get("content"), str):
        return str(message["content"])
    return "".join(
        part["text"] if part["type"] == "text" else placeholders[part["type"]] for part in message_parts(message)
    )


def message_name(messages: Conversation, index: int) -> str:
    """The name of a message in errors."""
    return f"message {index} ({messages[index]['role']})"


def _check_message(index: int, message: object) -> None:
    if not isinstance(message, dict):
        raise VLBridgeError(f"message {index}: expected an object with 'role' and 'content', found {shown(message)}")
    role, content = message.get("role"), message.get("content")
    own = MESSAGE_KEYS.get(role, ()) if isinstance(role, str) else ()
    check_keys(f"message {index}", message, ("role", "content", *own))
    if not isinstance(role, str) or role not in ROLES:
        raise VLBridgeError(f"message {index}: expected 'role' to be one of {', '.join(ROLES)}, found {shown(role)}")
    name = f"message {index} ({role})"
    calls = read_calls(name, message.get("tool_calls"))
    if message.get("reasoning_content") is not None:
        _check_text(name, message["reasoning_content"], "reasoning_content")
    if not isinstance(message.get("train", True), bool):
        raise VLBridgeError(f"{name}: expected 'train' to be true or false, found {shown(message['train'])}")
    _check_weight(name, message)
    if isinstance(content, str):
        _check_text(name, content)
    elif isinstance(content, list) and content:
        for part_index, part in enumerate(content):
            _check_part(f"{name}, part {part_index}", part, role)
    elif content is not None or not calls:
        raise VLBridgeError(
            f"{name}: expected 'content' to be a string or a list of at least one part, found {shown(content)}"
        )


def _check_weight(name: str, message: Message) -> None:
    weight = message.get("weight", 1)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not (weight == 0 or WEIGHTS[0] <= weight <= WEIGHTS[1]):
        low, high = WEIGHTS
        raise VLBridgeError(f"{name}: expected 'weight' to be 0, or from {low} to {high}, found {shown(weight)}")
    if "train" in message and "weight" in message and message["train"] != (weight > 0):
        raise VLBridgeError(f"{name}: 'train' {shown(message['train'])} contradicts 'weight' {weight}; remove one")


def _check_result(index: int, message: Message, calls: Sequence[Call]) -> None:
    """Templates write no ids: results must be in the order of the calls before them."""
    expected = {"tool_call_id": calls[0].id, "name": calls[0].name} if calls else {}
    for key in ("tool_call_id", "name"):
        if message.get(key) not in (None, expected.get(key)):
            call = f"{expected.get(key)!r}, that of the call" if calls else "a tool call before it"
            raise VLBridgeError(
                f"message {index} (tool): {key}: expected {call}, found {shown(message[key])}; write results in the "
                "order of the calls, and one for each"
            )


def _check_part(name: str, part: object, role: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in PART_KEYS:
        raise VLBridgeError(f"{name}: expected an object of type text, image or video, found {shown(part)}")
    check_keys(f"{name}, {kind}", part, ("type", *PART_KEYS[kind]))
    if kind == "text":
        _check_text(name, part.get("text"))
    elif role not in ("user", "tool"):
        raise VLBridgeError(
            f"{name}: expected text, found {kind}: only user and tool messages may contain images and videos"
        )


def _check_text(name: str, text: object, key: str = "text") -> None:
    if not isinstance(text, str):
        raise VLBridgeError(f"{name}: expected a string under {key!r}, found {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VLBridgeError(
            f"{name}: expected Unicode text, found a lone surrogate, {text[error.start]!a}, at character {error.start}"
        ) from None
