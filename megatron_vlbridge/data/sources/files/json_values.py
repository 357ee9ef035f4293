"""Parse JSON strictly: what Python's parser accepts although it is no JSON, or drops, is an error."""

import json
import math
from typing import Any

from megatron_vlbridge.errors import VLBridgeError

LIST_HINT = "; a file that is one list, [..., ...], must end with .json"


def parse_json(content: bytes) -> Any:
    """The value of one record.

    Raises VLBridgeError: it is not UTF-8 or not JSON, has a duplicate key (Python keeps the last), NaN, an infinity, or
    a number beyond the range of a float.
    Example: `parse_json(b'{"a": 1}')` is `{"a": 1}`.
    """
    try:
        return json.loads(
            utf8_text(content),
            object_pairs_hook=_object,
            parse_constant=_reject_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except json.JSONDecodeError as error:
        start = content.strip()
        raise VLBridgeError(
            f"expected one JSON object on the line, found {start[:80].decode(errors='replace')!r} "
            f"(column {error.colno}: {error.msg}){LIST_HINT if start.startswith(b'[') else ''}"
        ) from error
    except RecursionError:
        raise VLBridgeError("expected one JSON object on the line, found too many nesting levels") from None


def utf8_text(content: bytes) -> str:
    """The text of bytes in UTF-8 (VLBridgeError if they are not)."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise VLBridgeError(
            f"expected UTF-8 text, found {error.reason} at byte {error.start}; save the file as UTF-8"
        ) from error


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
