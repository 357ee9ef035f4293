"""Conversations from JSON Lines: everything on a line is used or rejected, with file and line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.conversations import read_conversations
from megatron_vlbridge.demo.tiny_processor import build_processor
from megatron_vlbridge.training.launch.arguments import add_arguments
from megatron_vlbridge.training.launch.parser import make_parser
from tests.errors import rejects

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD = json.dumps({"messages": TALK})


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_file_is_read_with_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = build_processor(["hello", "seven"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    (tmp_path / "set").mkdir()
    for index, image in enumerate(images):
        image.save(tmp_path / "set" / f"{index}.png")

    def talk(image: Any, frames: list) -> list:
        video = {"type": "video", "video": frames, "fps": 2}
        parts = [{"type": "image", "image": image}, video, {"type": "text", "text": "hello"}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": "é seven"}]

    names = [f"{index}.png" for index in range(4)]
    path = write_lines(tmp_path / "set" / "train.jsonl", json.dumps({"messages": talk(names[0], names)}), GOOD)
    monkeypatch.chdir(tmp_path)
    read = read_conversations(path.relative_to(tmp_path))
    assert len(read) == 2
    found, expected = (encode_conversation(messages, processor) for messages in (read[0], talk(images[0], images)))
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.pixel_values, expected.pixel_values)
    assert torch.equal(found.pixel_values_videos, expected.pixel_values_videos)
    assert read[1] == TALK


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + GOOD.encode() + b"\r\n  \t\r\n\n" + GOOD.encode())
    read = read_conversations(path)
    assert list(read) == [TALK, TALK]
    assert [conversation.location for conversation in read] == [f"{path}, line 2", f"{path}, line 5"]
    path.write_bytes(GOOD.replace(", ", ",\r").encode() + b"\n" + GOOD.encode())  # a carriage return within a line
    assert [conversation.location for conversation in read_conversations(path)] == [
        f"{path}, line 1",
        f"{path}, line 2",
    ]
    path.write_bytes(b"\n\n\n\n" + GOOD.encode() + b"\n\xef\xbb\xbf" + GOOD.encode())
    with rejects("line 6: "):
        list(read_conversations(path))


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    text = " \u2028\u0085\x0b\x0c\r\n\x00 <b> & é 😀 cafe\u0301 "
    path = tmp_path / "train.jsonl"
    for ascii_only in (True, False):
        line = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=ascii_only)
        path.write_bytes(line.encode())
        assert read_conversations(path)[0][0]["content"] == text


def line(**keys: Any) -> str:
    return json.dumps({"messages": TALK, **keys})


def with_part(**keys: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, keys]}, TALK[1]]})


REJECTED = {
    "no JSON": ("{", "one JSON object on the line, found '{' (column 2: "),
    "trailing comma": (GOOD[:-1] + ",}", "one JSON object on the line"),
    "two objects": (GOOD + GOOD, "Extra data"),
    "deep": ("[" * 200_000, "one JSON object on the line"),
    "list": ("[]", 'expected {"messages"'),
    "number": ("3", "found int '3'"),
    "null": ("null", "found nothing"),
    "no key": ("{}", "found the keys []"),
    "other format": ('{"conversations": [{"from": "human"}]}', "found the keys ['conversations']"),
    "messages as number": ('{"messages": 3}', "a list of messages, found int"),
    "messages null": ('{"messages": null}', "a list of messages, found nothing"),
    "no message": ('{"messages": []}', "at least one message"),
    "message as text": ('{"messages": ["x"]}', "message 0: expected an object"),
    "no content": ('{"messages": [{"role": "user"}]}', "message 0 (user): expected 'content'"),
    "images": (line(images=["a.png"]), "the line: unknown key 'images'"),
    "videos": (line(videos=[]), "the line: unknown key 'videos'"),
    "tools as text": (line(tools="[]"), "found str '[]'"),
    "tools false": (line(tools=False), "tools: expected a list of"),
    "tool as text": (line(tools=[{"name": "a"}, "look"]), "tool 1: expected"),
    "tool without a name": (line(tools=[{"type": "function", "function": {}}]), "tool 0: expected"),
    "lone surrogate in a tool": (line(tools=[{"name": "\ud800"}]), "tool 0: expected JSON values of Unicode text"),
    "system": (line(system="s"), "the line: unknown key 'system'"),
    "id": (line(id=3), "the line: unknown key 'id'"),
    "nframes": (with_part(type="video", video="a", nframes=9), "message 0 (user), part 1, video: unknown key"),
    "duplicate key": (GOOD[:-1] + ', "messages": []}', "key 'messages' occurs twice"),
    "duplicate role": ('{"messages": [{"role": "user", "content": "q", "role": "user"}]}', "key 'role' occurs twice"),
    "NaN": (with_part(type="video", video=[], fps=float("nan")), "NaN is not a JSON value"),
    "infinity": (with_part(type="video", video=[], fps=-float("inf")), "-Infinity is not a JSON value"),
    "too large": (with_part(type="video", video=[], fps=1.5).replace("1.5", "1e999"), "1e999 is too large"),
    "lone surrogate": (line(messages=[{"role": "user", "content": "\ud800"}]), "found a lone surrogate"),
    "integer too large": (with_part(type="video", video=[], fps=7).replace("7", "7" * 5000), "777 is too large"),
    "NUL": ('{"messages": "\x00"}', "one JSON object on the line"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "problem"), REJECTED.values(), ids=REJECTED.keys())
def test_a_bad_line_is_rejected_with_file_and_line(tmp_path: Path, bad: str, problem: str) -> None:
    path = write_lines(tmp_path / "train.jsonl", GOOD, "", bad, GOOD)
    with rejects(problem, start=f"{path}, line 3: "):
        list(read_conversations(path))
    read = read_conversations(path, split="train")
    assert [read[0], read[2]] == [TALK, TALK]
    with rejects(problem, start=f"train data {path}, line 3: "):
        read[1]


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("images", '{"type": "image", "image": "a.png"}'),
        ("videos", "as a content part"),
        ("system", '"role": "system"'),
        ("id", "name it under `ignore` in the YAML file of --data, or remove it"),
    ],
)
def test_an_unknown_key_of_a_line_is_rejected_with_the_remedy(tmp_path: Path, key: str, remedy: str) -> None:
    with rejects(f"unknown key '{key}'", remedy):
        list(read_conversations(write_lines(tmp_path / "train.jsonl", line(**{key: []}))))


@pytest.mark.parametrize(
    "tag",
    [
        "<image>",
        "<video>",
        "<audio>",
        "<image_1>",
        "<image 2>",
        "<|image_1|>",
        "<|image|>",
        "<IMAGE>",
        "<ImageHere>",
        "<image_placeholder>",
    ],
)
def test_a_tag_of_another_format_is_rejected_without_literal_tags(tmp_path: Path, tag: str) -> None:
    for content in (f"{tag}what?", [{"type": "text", "text": tag[:3]}, {"type": "text", "text": f"{tag[3:]}\nwhat?"}]):
        path = write_lines(tmp_path / "train.jsonl", line(messages=[{"role": "user", "content": content}, TALK[1]]))
        with rejects("line 1: message 0 (user): the text contains", repr(tag), '"type": "image"'):
            list(read_conversations(path))
        assert read_conversations(path, literal_tags=True)[0][0]["content"] == content


def test_the_option_named_in_the_error_exists(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", line(messages=[{"role": "user", "content": "<image>"}]))
    with rejects("--literal-tags"):
        list(read_conversations(path))
    parser = make_parser(add_arguments)
    assert [parser.parse_args(words).literal_tags for words in ([], ["--literal-tags"])] == [False, True]


def test_a_path_in_media_tags_is_rejected_and_markup_is_not(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for tag, text in {
        "<img>": "<img>a.png</img> what?",
        "<image_1>": "what is this<image_1>",
        "<ImageHere>": "what is this<ImageHere>",
        "<VIDEO>": "Who? <VIDEO>",
        "<video>": "<video>my clip.mp4 </video>",
        "<audio>": "<audio>set/1</audio>",
        "<image>": "<video>\n<p></p></video><image>./</image>",
        "<image_00>": "</image><image_00>",
    }.items():
        write_lines(path, line(messages=[{"role": "user", "content": text}]))
        with rejects(f"'{tag}'"):
            list(read_conversations(path))
    texts = [
        "<video>\n<source src='a'></video>",
        "List<VIDEO> of <image_placeholder>x</image_placeholder>",
        "<image x>",
        "<images>",
        "a <imag",
        "image>",
        '<img src="a.png">',
        "the `<img>` and the ``<video>`` tag",
        "<video>not supported</video><audio></audio>",
        "<think>",
    ]
    write_lines(path, line(messages=[{"role": "assistant", "content": text} for text in texts]))
    assert [message["content"] for message in read_conversations(path)[0]] == texts


def test_paths_are_resolved_and_urls_are_not(tmp_path: Path) -> None:
    sources = {
        "a.png": str(tmp_path / "a.png"),
        "../b:1.png": str(tmp_path / "../b:1.png"),
        "/c.png": "/c.png",
        **{name: name for name in ("http://x/a.png", "https://x/a", "data:image/png;base64,AAAA", "file:///a.png", "s3://b/a")},
    }  # fmt: skip
    write_lines(tmp_path / "train.jsonl", *(with_part(type="image", image=source) for source in sources))
    read = read_conversations(tmp_path / "train.jsonl")
    assert [conversation[0]["content"][1]["image"] for conversation in read] == list(sources.values())


def test_a_missing_empty_or_binary_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for missing in (path, tmp_path):
        with rejects(start=f"{missing}: cannot read the file"):
            read_conversations(missing)
    path.write_text("\n \n")
    with rejects("train.jsonl: expected at least one conversation"):
        read_conversations(path)
    path.write_bytes(GOOD.encode() + b'\n{"messages": "\xff"}\n')
    with rejects("train.jsonl, line 2: expected UTF-8 text", "at byte 14"):
        list(read_conversations(path))
    path.write_bytes(GOOD.encode("utf-16"))
    with rejects("train.jsonl, line 1: expected UTF-8 text"):
        list(read_conversations(path))


def test_tools_results_and_calls_are_read(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}, {"name": "find"}]
    messages = [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"image": "b.png"}}]},
        {"role": "tool", "content": [{"type": "image", "image": "a.png"}]},
        {"role": "assistant", "tool_calls": [{"name": "find"}]},
    ]
    path = write_lines(tmp_path / "a.jsonl", line(messages=messages, tools=tools), line(tools=None), line())
    read = read_conversations(path)
    assert [one.tools for one in read] == [tools, [], []]
    resolved = {"role": "tool", "content": [{"type": "image", "image": str(tmp_path / "a.png")}]}
    assert list(read[0]) == [*messages[:2], resolved, {**messages[3], "content": None}]


def test_a_tag_of_another_format_in_the_reasoning_is_rejected(tmp_path: Path) -> None:
    messages = [TALK[0], {"role": "assistant", "content": "a", "reasoning_content": "In <image> I see"}]
    path = write_lines(tmp_path / "a.jsonl", line(messages=messages))
    with rejects("line 1: message 1 (assistant)", "'<image>'", "--literal-tags"):
        list(read_conversations(path))
