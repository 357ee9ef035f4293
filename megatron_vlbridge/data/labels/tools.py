r"""Tools and tool calls: their format, and how the published chat templates render calls.

Qwen3-VL and Qwen3 render a call as JSON, `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`; Qwen3.5 and
later as tags, `<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>`. The
texts are written here a second time, so that a template which renders anything else is noticed.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_vlbridge.data.media import shown
from megatron_vlbridge.errors import VLBridgeError

CALL_FORM = '{"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}'
TOOL_FORM = '{"type": "function", "function": {"name": "look", "description": ..., "parameters": {...}}}'


class Call(NamedTuple):
    """A tool call: the name of the function, its arguments, and the id that results refer to."""

    name: str
    arguments: dict[str, Any]
    id: str | None


def read_calls(where: str, calls: object) -> list[Call]:
    """The tool calls of an assistant message; `arguments` may be an object or, as of OpenAI, its JSON text.

    Raises VLBridgeError: a call has another format or an unknown key.
    Example: `read_calls("message 1", [{"function": {"name": "look", "arguments": '{"x": 1}'}}])` is
    `[Call(name='look', arguments={'x': 1}, id=None)]`.
    """
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise VLBridgeError(f"{where}: expected 'tool_calls' to be a list of {CALL_FORM}, found {shown(calls)}")
    return [_read_call(f"{where}, tool call {index}", call) for index, call in enumerate(calls)]


def check_tools(tools: object) -> None:
    """Check the `tools` of a conversation: a list of JSON objects with the name of a function.

    Raises VLBridgeError: they have another format.
    """
    if not isinstance(tools, list):
        raise VLBridgeError(f"tools: expected a list of {TOOL_FORM}, found {shown(tools)}")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise VLBridgeError(f"tool {index}: expected {TOOL_FORM}, found {shown(tool)}")
        _check_json(f"tool {index}", tool)


def call_texts(calls: Sequence[Call]) -> list[str]:
    """The forms in which published chat templates render these calls, without what stands before the first."""
    forms: tuple[Callable[[Call], str], ...] = (
        _as_json,
        lambda call: _as_tags(call, str),  # Qwen3.5: True, None
        lambda call: _as_tags(call, _json),  # Qwen3.6: true, null
    )
    return list(dict.fromkeys("\n".join(map(form, calls)) for form in forms))


def tool_text(tool: object) -> str:
    """A tool as published chat templates render it."""
    return _json(tool)


def _read_call(where: str, call: object) -> Call:
    keys: tuple[str, ...] = ("type", "id", "function")
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call, keys = {"function": call}, ("function",)
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or call.get("type", "function") != "function":
        raise VLBridgeError(f"{where}: expected {CALL_FORM}, found {shown(call)}")
    unknown = [*(call.keys() - keys), *(function.keys() - {"name", "arguments"})]
    if unknown:
        raise VLBridgeError(f"{where}: unknown key {', '.join(map(repr, sorted(unknown)))}; expected {CALL_FORM}")
    name, found, identity = function.get("name"), function.get("arguments", {}), call.get("id")
    if not isinstance(name, str) or not name or not isinstance(identity, str | None):
        raise VLBridgeError(
            f"{where}: expected a function name and an id as text, found {shown(name)}, {shown(identity)}"
        )
    if re.search(r"[<>\n]", name):
        raise VLBridgeError(f"{where}: expected a function name without <, > and newlines, found {name!r}")
    arguments = _parse(where, found) if isinstance(found, str) else found
    if not isinstance(arguments, dict):
        raise VLBridgeError(f"{where}: expected 'arguments' to be an object, found {shown(found)}")
    _check_json(where, [name, arguments])
    if any(re.search(r"[<>\n]", key) for key in arguments):
        raise VLBridgeError(f"{where}: expected names of arguments without <, > and newlines, found {shown(arguments)}")
    return Call(name, arguments, identity)


def _parse(where: str, text: str) -> object:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise VLBridgeError(f"{where}: expected 'arguments' to be JSON, found {shown(text)} ({error})") from error


def _check_json(where: str, value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise VLBridgeError(f"{where}: expected JSON values of Unicode text, found {shown(value)} ({error})") from error


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_json(call: Call) -> str:
    return f"<tool_call>\n{_json({'name': call.name, 'arguments': call.arguments})}\n</tool_call>"


def _as_tags(call: Call, scalar: Callable[[object], str]) -> str:
    def text(value: object) -> str:
        if isinstance(value, str):
            return value
        return _json(value) if isinstance(value, dict | list) else scalar(value)

    parameters = "".join(f"<parameter={key}>\n{text(value)}\n</parameter>\n" for key, value in call.arguments.items())
    return f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>"
