"""Rows of a table as conversations of one question and one answer."""

from collections.abc import Mapping
from typing import Any

from megatron_vlbridge.data.sources.forms.tagged import media_part
from megatron_vlbridge.errors import VLBridgeError

type Record = dict[str, Any]

COLUMNS = ("system", "user", "assistant", "image", "images", "video", "videos")


def check_columns(columns: object) -> dict[str, str]:
    """The mapping from what a column is to its name.

    Raises VLBridgeError: a key is not in `COLUMNS`, a name is not a string or occurs twice, user or assistant is
    missing, or `image` stands beside `images`.
    Example: `check_columns({"user": "question", "assistant": "answer", "image": "file"})`.
    """
    example = "{user: question, assistant: answer, image: file}"
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise VLBridgeError(f"columns: expected names of columns such as {example}, found {columns!r}")
    if unknown := [key for key in columns if key not in COLUMNS]:
        raise VLBridgeError(f"columns: expected keys of {', '.join(COLUMNS)}, found {unknown[0]!r}")
    if missing := [key for key in ("user", "assistant") if key not in columns]:
        raise VLBridgeError(f"columns: {missing[0]!r} is missing, expected names such as {example}")
    names = list(columns.values())
    if twice := [name for name in names if names.count(name) > 1]:
        raise VLBridgeError(f"columns: the column {twice[0]!r} is named twice")
    for kind in ("image", "video"):
        if kind in columns and f"{kind}s" in columns:
            raise VLBridgeError(f"columns: expected {kind!r} for one in a row, or '{kind}s' for a list, found both")
    return columns


def from_columns(record: Record, columns: Mapping[str, str]) -> Record:
    """The messages form of a row: images, then videos, then the text of the user, and the answer.

    An empty (null) system text, image or video is left out. Columns that are not named are left for the check.

    Raises VLBridgeError: a column is missing, or is no list where one is expected.
    Example: `from_columns({"q": "Who?", "a": "A cat."}, {"user": "q", "assistant": "a"})` is
    `{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]}`.
    """
    if missing := [name for name in columns.values() if name not in record]:
        raise VLBridgeError(f"expected a column {missing[0]!r}, found {sorted(record)}")
    value = {key: record[name] for key, name in columns.items()}
    parts = []
    for kind in ("image", "video"):
        items = value.get(f"{kind}s") or []
        if not isinstance(items, list):
            raise VLBridgeError(
                f"column {columns[f'{kind}s']!r}: expected a list, found {type(items).__name__}; for one path name the "
                f"column {kind!r}; several in a row need Parquet or JSON"
            )
        one = value.get(kind)
        parts += [media_part(kind, item) for item in (items if one is None else [one])]
    user = [*parts, {"type": "text", "text": value["user"]}] if parts else value["user"]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": value["assistant"]}]
    if value.get("system") is not None:
        messages.insert(0, {"role": "system", "content": value["system"]})
    named = set(columns.values())
    return {"messages": messages, **{key: other for key, other in record.items() if key not in named}}
