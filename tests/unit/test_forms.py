"""Each form of a record becomes the messages form, text unchanged; another one is refused with the right one."""

import base64
import json
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_vlbridge.data.conversations import FileConversations
from megatron_vlbridge.data.media import load_image
from megatron_vlbridge.data.messages import message_text
from megatron_vlbridge.data.sources.files.json_lines import JsonLines
from megatron_vlbridge.data.sources.forms.registry import AUTO, FORMS, NAMES, convert_record, detect_form, find_form
from megatron_vlbridge.data.sources.forms.tagged import from_tags
from tests.errors import rejects

COLUMNS = {"user": "q", "assistant": "a", "image": "file"}
# One conversation in each form.
EXPECTED = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "\nWho?"}]},
    {"role": "assistant", "content": "A cat."},
]
OPENAI_PART = {"type": "image_url", "image_url": {"url": "a.png"}}
SAME: dict[str, dict[str, Any]] = {
    "messages": {"messages": EXPECTED},
    "openai": {
        "messages": [
            {"role": "user", "content": [OPENAI_PART, {"type": "text", "text": "\nWho?"}]},
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "tags": {
        "messages": [{"role": "user", "content": "<image>\nWho?"}, {"role": "assistant", "content": "A cat."}],
        "images": ["a.png"],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A cat."}],
        "image": "a.png",
    },
    "columns": {"q": "\nWho?", "a": "A cat.", "file": "a.png"},
}


def form_of(name: str) -> Any:
    return find_form(name, COLUMNS if name == "columns" else None)


def open_records(path: Path, *records: Any, form: str, **options: Any) -> FileConversations:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return FileConversations(JsonLines(path), path, path.parent, form=form_of(form), **options)


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_is_the_same_in_every_form(name: str) -> None:
    record, form = SAME[name], form_of(name)
    before = json.dumps(record)
    assert convert_record(record, form) == ({"messages": EXPECTED}, form)
    assert json.dumps(record) == before, "the record was changed"
    if name != "columns":
        assert convert_record(record, form_of(AUTO)) == ({"messages": EXPECTED}, FORMS[name])


@pytest.mark.parametrize("name", SAME)
def test_a_file_of_every_form_is_read_with_its_folder(tmp_path: Path, name: str) -> None:
    read = open_records(tmp_path / "a.jsonl", SAME[name], form=name)
    expected = json.loads(json.dumps(EXPECTED).replace("a.png", f"{tmp_path}/a.png"))
    assert [list(read), list(pickle.loads(pickle.dumps(read)))] == [[expected]] * 2
    assert read[0].location == f"{tmp_path / 'a.jsonl'}, line 1"


@pytest.mark.parametrize(("form", "name"), [pair for pair in product(NAMES, SAME) if pair[0] not in (AUTO, pair[1])])
def test_another_form_is_rejected_with_the_right_one(tmp_path: Path, form: str, name: str) -> None:
    read = open_records(tmp_path / "a.jsonl", SAME[name], form=form)
    if name == "messages" and form in ("openai", "tags"):
        assert read[0][1] == EXPECTED[1]  # a part of these forms too
        return
    with rejects(start=f"{tmp_path / 'a.jsonl'}, line 1: ") as error:
        read[0]
    assert name == "columns" or f"this is the form {name}, {FORMS[name].example}: `form: {name}`" in str(error.value)
    assert form != "columns" or 'expected {"q": ..., "a": ..., "file": ...}, found the keys' in str(error.value)


WORDS = st.lists(st.sampled_from(["<image>", "<video>", "<imag", "e>", "\n", "`", "hello", "<images>", "< image>"]))


@given(st.lists(WORDS, min_size=1))
def test_a_tag_becomes_the_next_file_and_texts_stay(texts: list[list[str]]) -> None:
    """The oracle: replace tags in the text."""
    contents = ["".join(words) for words in texts]
    counts = {kind: sum(text.count(f"<{kind}>") for text in contents) for kind in ("image", "video")}
    media = {f"{kind}s": [f"{kind}{n}" for n in range(count)] for kind, count in counts.items()}
    converted = from_tags({"messages": [{"role": "user", "content": text} for text in contents], **media})
    assert converted.keys() == {"messages"}
    names = {kind: f"[{kind}]" for kind in counts}
    for message, text in zip(converted["messages"], contents, strict=True):
        expected = text.replace("<image>", "[image]").replace("<video>", "[video]")
        assert message_text(message, names) == expected
        assert isinstance(message["content"], str) == (expected == text)
    parts = [part for message in converted["messages"] if message["content"] for part in message["content"]]
    found = [part[kind] for kind in counts for part in parts if isinstance(part, dict) and part["type"] == kind]
    assert found == media["images"] + media["videos"]


USER = {"role": "user", "content": "<image>q"}
HUMAN = {"from": "human", "value": "<image>q"}
REJECTED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "more tags": ("tags", {"messages": [USER, USER], "images": ["a"]}, ("<image> 2 times", "1 under 'images'")),
    "fewer tags": ("tags", {"messages": [USER], "images": ["a", "b"]}, ("<image> 1 times", "2 under 'images'")),
    "no list": ("tags", {"messages": [USER]}, ("<image> 1 times in the texts and 0 under 'images'",)),
    "no tag": ("sharegpt", {"conversations": [{**HUMAN, "value": "q"}], "image": "a"}, ("0 times", "1 under 'image'")),
    "video": ("tags", {"messages": [USER], "images": ["a"], "videos": ["b"]}, ("<video> 0 times", "1 under 'videos'")),
    "text for a list": ("tags", {"messages": [USER], "images": "a"}, ("a list under 'images', found str 'a'",)),
    "both keys": ("tags", {"messages": [USER], "images": ["a"], "image": "a"}, ("found 'image' and 'images'",)),
    "audio": ("tags", {"messages": [USER], "images": ["a"], "audios": []}, ("unknown key 'audios'", "not supported")),
    "id": ("sharegpt", {"conversations": [HUMAN], "image": "a", "id": 1}, ("unknown key 'id'", "'conversations'")),
    "image of the assistant": (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "<image>"}], "image": "a"},
        ("message 0 (assistant), part 0", "only user and tool messages"),
    ),
    "other speaker": ("sharegpt", {"conversations": [{"from": "bing", "value": ""}]}, ("message 0: expected 'role'",)),
    "role in sharegpt": ("sharegpt", {"conversations": [USER]}, ("message 0: expected the keys 'from' and 'value'",)),
    "tag in a list": (
        "tags",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}], "images": ["a"]},
        ("<image> 0 times in the texts and 1 under 'images'; contents that are lists do not count",),
    ),
    "from in tags": ("tags", {"messages": [HUMAN]}, ("unknown key 'from', 'value'", "expected 'role' and 'content'")),
    "message as text": ("sharegpt", {"conversations": ["q"]}, ("message 0: ", "found str 'q'")),
    "weight of a message": ("sharegpt", {"conversations": [{**HUMAN, "value": "", "w": 1}]}, ("unknown key 'w'",)),
    "messages beside": ("sharegpt", {"conversations": [], "messages": []}, ("key 'messages' beside 'conversations'",)),
    "no messages": ("tags", {"messages": 3}, ("a list of messages, found int",)),
    "no conversations": ("sharegpt", {"conversations": 3}, ("a list of messages, found int",)),
    "column messages": ("columns", {**SAME["columns"], "messages": []}, ("unknown key 'messages' beside 'q'",)),
    "column missing": ("columns", {"q": "", "a": ""}, ("expected a column 'file', found ['a', 'q']",)),
    "column too many": ("columns", {**SAME["columns"], "id": 1}, ("unknown key 'id'", "'q', 'a', 'file'")),
    "column that has no name": (
        "columns",
        {**SAME["columns"], "image": "a.png"},
        ("name the column under `columns`, or",),
    ),
    "number as answer": ("columns", {**SAME["columns"], "a": 3}, ("message 1 (assistant): expected 'content'",)),
    "auto, no form": (AUTO, {"q": "", "a": ""}, ("keys ['a', 'q'] are those of no form", "`form: columns`")),
    "auto, two forms": (
        AUTO,
        {"messages": [], "conversations": []},
        ("of the forms messages and of sharegpt, expected one form",),
    ),
    "auto, urls and tags": (
        AUTO,
        {"messages": [USER, {"role": "user", "content": [OPENAI_PART]}], "images": ["a"]},
        ("of the forms tags and of openai",),
    ),
    "auto, a list": (AUTO, [], ('expected {"messages": ',)),  # type: ignore[dict-item]
    "other tag": ("tags", {"messages": [{**USER, "content": "<image><audio>"}], "images": ["a"]}, ("'<audio>'",)),
}


@pytest.mark.parametrize(("form", "record", "problems"), REJECTED.values(), ids=REJECTED.keys())
def test_a_record_that_is_not_of_its_form_is_rejected(
    tmp_path: Path, form: str, record: Any, problems: tuple[str, ...]
) -> None:
    with rejects(*problems, start=f"{tmp_path / 'a.jsonl'}, line 1: ") as error:
        open_records(tmp_path / "a.jsonl", record, form=form)[0]
    assert form != "tags" or "this is the form" not in str(error.value), "its keys are those of its form"


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("a b.png", "a b.png"),
        ("file:///x/a%20b.png", "/x/a b.png"),
        ("file://localhost/a.png", "/a.png"),
        ("file:////srv/a.png", "//srv/a.png"),
        ("//[draft]/x.png", "//[draft]/x.png"),
        ("http://[bad/x.png", "http://[bad/x.png"),
        ("data:image/png;base64,AAEC", b"\x00\x01\x02"),
        ("DATA:image/svg+xml;BASE64,", b""),
        ("https://x/a.png", "https://x/a.png"),  # rejected when it is read, unless there is a cache
    ],
)
def test_a_url_of_openai_is_a_path_or_bytes(url: str, source: str | bytes) -> None:
    for value in (url, {"url": url}, {"url": url, "detail": "auto"}):
        record = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": value}]}]}
        [message] = convert_record(record, FORMS["openai"])[0]["messages"]
        assert message["content"] == [{"type": "image", "image": source}]


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"image_url": {"url": "s3://x/a.png"}}, "is not supported"),
        ({"image_url": {"url": "file://host/a.png"}}, "is not supported"),
        ({"image_url": {"url": "file:a.png"}}, "is not supported"),
        ({"image_url": {"url": "data:image/png,AAEC"}}, "is not supported"),
        ({"image_url": {"url": "data:text/plain;base64,AAEC"}}, "or data:image/...;base64"),
        ({"image_url": {"url": "data:image/png;base64,AA*EC"}}, "expected base64"),
        ({"image_url": {"url": "data:image/png;base64,AAE"}}, "expected base64"),
        ({"image_url": {"url": "a.png", "detail": "low"}}, "'detail' 'low' would have no effect"),
        ({"image_url": {}}, 'expected {"url": ...}'),
        ({"image_url": 3}, "found int '3'"),
        ({}, "found nothing"),
        ({"image_url": {"url": "a.png", "size": 3}}, "unknown key 'size'"),
        ({"image_url": {"url": "a.png"}, "size": 3}, "unknown key 'size'"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAEC"}}, "write its path, file:///the/path"),
    ],
)
def test_another_url_of_openai_is_rejected(tmp_path: Path, part: dict[str, Any], problem: str) -> None:
    content = [{"type": "text", "text": "q"}, {"type": "image_url", **part}]
    read = open_records(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": content}]}, form="openai")
    with rejects(problem, "line 1: message 0 (user), part 1"):
        read[0]


def test_an_image_in_a_url_has_the_pixels_of_the_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    read = open_records(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": [part]}]}, form="openai")
    assert np.array_equal(np.array(load_image(read[0][0]["content"][0])), pixels)


def test_items_of_media_lists() -> None:
    items: list[Any] = ["a", {"bytes": b"x", "path": "a"}, {"bytes": None, "path": "a"}, {"path": "a"}, ["f0", "f1"]]
    items += [{"video": ["f0"], "fps": 2}, {"url": "a"}, {}]
    record = {"messages": [{"role": "user", "content": "<video>" * len(items)}], "videos": items}
    parts = convert_record(record, FORMS["tags"])[0]["messages"][0]["content"]
    values = ["a", b"x", "a", "a", ["f0", "f1"], ["f0"], {"url": "a"}, {}]
    assert [part["video"] for part in parts] == values
    assert parts[5] == {"type": "video", "video": ["f0"], "fps": 2}


def test_what_is_optional_is_left_out() -> None:
    turn = {"from": "human", "value": "q"}
    for extra, roles in (
        ({}, ["user"]),
        ({"system": None, "image": None, "images": None, "videos": []}, ["user"]),
        ({"system": ""}, ["user"]),
        ({"system": "s"}, ["system", "user"]),
    ):
        converted, _ = convert_record({"conversations": [turn], **extra}, FORMS["sharegpt"])
        assert [message["role"] for message in converted["messages"]] == roles
        assert converted.keys() == {"messages"}
    form = find_form("columns", {"user": "q", "assistant": "a", "system": "s", "images": "files", "video": "v"})
    row = {"q": "q", "a": "a", "s": None, "files": None, "v": None}
    assert [m["content"] for m in convert_record(row, form)[0]["messages"]] == ["q", "a"]
    row = {"q": "q", "a": "a", "s": "s", "files": ["1", {"bytes": b"2", "path": None}], "v": "3"}
    system, user, _ = convert_record(row, form)[0]["messages"]
    assert system == {"role": "system", "content": "s"}
    assert [part[part["type"]] for part in user["content"]] == ["1", b"2", "3", "q"]
    with rejects("column 'files': expected a list, found str; for one path name the column 'image'"):
        convert_record({**row, "files": "1"}, form)


def test_keys_are_ignored_only_if_they_are_named(tmp_path: Path) -> None:
    record = {**SAME["sharegpt"], "id": 7, "source": "web"}
    read = open_records(tmp_path / "a.jsonl", record, form="sharegpt", ignore=["id", "source"])
    assert read[0][1] == EXPECTED[1]
    with rejects("unknown key 'source'"):
        open_records(tmp_path / "a.jsonl", record, form="sharegpt", ignore=["id"])[0]


@pytest.mark.parametrize(
    ("name", "columns", "problem"),
    [
        ("alpaca", None, "form: expected one of auto, messages, openai, tags, sharegpt, columns, found 'alpaca'"),
        ("tags", {"user": "q"}, "columns: expected the form columns, found the form tags"),
        (AUTO, {"user": "q"}, "columns: expected the form columns, found the form auto"),
        ("columns", None, "columns: expected names of columns such as {user: question"),
        ("columns", {"user": 3}, "columns: expected names of columns"),
        ("columns", {"user": "q"}, "columns: 'assistant' is missing"),
        ("columns", {"assistant": "q"}, "columns: 'user' is missing"),
        ("columns", {**COLUMNS, "question": "x"}, "found 'question'"),
        ("columns", {"user": "q", "assistant": "q"}, "the column 'q' is named twice"),
        ("columns", {**COLUMNS, "images": "x"}, "'images' for a list, found both"),
    ],
)
def test_a_form_that_does_not_exist_is_rejected(name: str, columns: Any, problem: str) -> None:
    with rejects(problem):
        find_form(name, columns)


def test_text_conversations_are_detected_as_messages() -> None:
    for messages in ([], 3, None, [3], [{"role": "user", "content": [3, {"type": []}]}]):
        assert detect_form({"messages": messages}).name == "messages"
