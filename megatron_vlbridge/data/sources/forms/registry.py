"""The forms of records, and which one a record has. Every form is converted to the messages form, and checked there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_vlbridge.data.media import shown
from megatron_vlbridge.data.sources.files.json_values import LIST_HINT
from megatron_vlbridge.data.sources.forms.columns import check_columns, from_columns
from megatron_vlbridge.data.sources.forms.openai import KINDS, from_openai
from megatron_vlbridge.data.sources.forms.tagged import SHAREGPT_KEYS, TAG_KEYS, from_sharegpt, from_tags
from megatron_vlbridge.errors import VLBridgeError

type Record = dict[str, Any]

AUTO = "auto"


@dataclass(frozen=True)
class Form:
    """A form: the `keys` of its records, first the one that each has, and an `example`.

    `columns` is the mapping of the form "columns", see `columns.check_columns`. `convert` returns the record in the
    messages form. It is a pure function and reads no file.
    """

    name: str
    keys: tuple[str, ...]
    example: str
    convert: Callable[[Record], Record]
    columns: Mapping[str, str] = field(default_factory=dict)


def _unchanged(record: Record) -> Record:
    return record


FORMS = {
    form.name: form
    for form in (
        Form("messages", ("messages",), '{"messages": [{"role": "user", "content": ...}, ...]}', _unchanged),
        Form(
            "openai",
            ("messages",),
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, ...]}]}',
            from_openai,
        ),
        Form(
            "tags",
            TAG_KEYS,
            '{"messages": [{"role": "user", "content": "<image>Who?"}, ...], "images": ["a.png"]}',
            from_tags,
        ),
        Form(
            "sharegpt",
            SHAREGPT_KEYS,
            '{"conversations": [{"from": "human", "value": "<image>Who?"}, ...], "image": "a.png"}',
            from_sharegpt,
        ),
    )
}
NAMES = (AUTO, *FORMS, "columns")


def find_form(name: str, columns: object = None) -> Form | None:
    """The form of a name, None for "auto"; `columns` is the mapping of the form "columns".

    Raises VLBridgeError: there is no such form, or `columns` belongs to another form, is missing or invalid.
    Example: `find_form("tags").convert(record)`.
    """
    if name not in NAMES:
        raise VLBridgeError(f"form: expected one of {', '.join(NAMES)}, found {name!r}")
    if name == "columns":
        names = check_columns(columns)
        example = "{" + ", ".join(f'"{column}": ...' for column in names.values()) + "}"
        return Form(name, tuple(names.values()), example, partial(from_columns, columns=names), names)
    if columns is not None:
        raise VLBridgeError(f"columns: expected the form columns, found the form {name}")
    return FORMS.get(name)


def detect_form(record: Record) -> Form:
    """The form of a record, from its keys.

    Raises VLBridgeError: the keys are those of no form or of several.
    Example: `detect_form({"conversations": [], "image": "a.png"}).name` is "sharegpt".
    """
    found = [FORMS[name] for name in _candidates(record)]
    if len(found) != 1:
        names = " and of ".join(form.name for form in found)
        raise VLBridgeError(
            f"form auto: the keys {sorted(map(str, record))} are those "
            + (f"of the forms {names}, expected one form" if found else f"of no form, expected {_examples()}")
            + "; name the form in the file of --data: `form: ...`, for other keys `form: columns`"
        )
    return found[0]


def convert_record(record: object, form: Form | None) -> tuple[Record, Form]:
    """A record in the messages form, and the form that it had; `form` None detects it.

    Raises VLBridgeError: it has not this form (see also `other_form`).
    Example: `convert_record({"conversations": [{"from": "gpt", "value": "A cat."}]}, None)[0]` is
    `{"messages": [{"role": "assistant", "content": "A cat."}]}`.
    """
    if not isinstance(record, dict):
        hint = LIST_HINT if isinstance(record, list) else ""
        raise VLBridgeError(f"expected {(form or FORMS['messages']).example}, found {shown(record)}{hint}")
    if form is None:
        form = detect_form(record)
    if form.keys[0] not in record:
        raise VLBridgeError(f"expected {form.example}, found the keys {sorted(record)}")
    if "messages" in record and "messages" not in form.keys:
        raise VLBridgeError(f"unknown key 'messages' beside {form.keys[0]!r}: remove it, or choose another form")
    return form.convert(record), form


def other_form(record: object, form: Form | None) -> str:
    """For an error: the form that a record has instead of `form`; empty if its keys do not say so."""
    found = _candidates(record) if isinstance(record, dict) else []
    if len(found) != 1 or form is None or found[0] == form.name:
        return ""
    if found[0] == "messages" and form.keys[0] == "messages":
        return ""  # conversations without media are the same in these forms
    return f"; this is the form {found[0]}, {FORMS[found[0]].example}: `form: {found[0]}` in the file of --data"


def _candidates(record: Mapping[str, Any]) -> list[str]:
    found = []
    if "messages" in record:
        media = any(key in record for key in TAG_KEYS[1:])
        urls = _has_urls(record["messages"])
        found = ["tags"] * media + ["openai"] * urls or ["messages"]
    return found + ["sharegpt"] * ("conversations" in record)


def _has_urls(messages: Any) -> bool:
    messages = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and str(part.get("type")) in KINDS for part in parts)


def _examples() -> str:
    return " or ".join(form.example for form in FORMS.values())
