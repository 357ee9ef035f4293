"""Conversations from JSON lines: everything on a line is honoured or refused, by file and line."""

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
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.arguments import add_arguments
from megatron_vlbridge.training.parser import make_parser

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
    for number, image in enumerate(images):
        image.save(tmp_path / "set" / f"{number}.png")

    def talk(image: Any, frames: list) -> list:
        video = {"type": "video", "video": frames, "fps": 2}
        parts = [{"type": "image", "image": image}, video, {"type": "text", "text": "hello"}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": "é seven"}]

    names = [f"{number}.png" for number in range(4)]
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
    assert read == [TALK, TALK]
    assert [conversation.place for conversation in read] == [f"{path}, line 2", f"{path}, line 5"]
    path.write_bytes(GOOD.replace(", ", ",\r").encode() + b"\n" + GOOD.encode())  # a blank inside of a line
    assert [conversation.place for conversation in read_conversations(path)] == [f"{path}, line 1", f"{path}, line 2"]
    path.write_bytes(b"\n\n\n\n" + GOOD.encode() + b"\n\xef\xbb\xbf" + GOOD.encode())
    with pytest.raises(VLBridgeError, match="line 6: "):
        read_conversations(path)


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


REFUSED = {
    "no JSON": ("{", r"one JSON object on the line, found '{' \(column 2: "),
    "trailing comma": (GOOD[:-1] + ",}", r"one JSON object on the line"),
    "two objects": (GOOD + GOOD, r"column \d+: Extra data"),
    "deep": ("[" * 200_000, r"nesting|one JSON object"),
    "list": ("[]", r'expected {"messages"'),
    "number": ("3", r"found int '3'"),
    "null": ("null", r"found NoneType"),
    "no key": ("{}", r"found the keys \[\]"),
    "other form": ('{"conversations": [{"from": "human"}]}', r"expected .*'?role.*found the keys \['conversations'\]"),
    "messages as number": ('{"messages": 3}', r"a list of messages, found int"),
    "messages null": ('{"messages": null}', r"a list of messages, found nothing"),
    "no message": ('{"messages": []}', r"at least one message"),
    "message as text": ('{"messages": ["x"]}', r"message 0: expected an object"),
    "no content": ('{"messages": [{"role": "user"}]}', r"message 0 \(user\): expected 'content'"),
    "images": (line(images=["a.png"]), r"unknown key 'images' .*\{\"type\": \"image\", \"image\": \"a.png\"\}"),
    "videos": (line(videos=[]), r"unknown key 'videos' .*as a content part"),
    "tools": (line(tools=[]), r"unknown key 'tools' .*tools are not supported"),
    "system": (line(system="s"), r'unknown key \'system\' .*"role": "system"'),
    "id": (line(id=3), r"unknown key 'id' .*remove it"),
    "max_pixels": (with_part(type="image", image="a", max_pixels=9), r"message 0 \(user\), part 1, image: .*'max_pix"),
    "key twice": (GOOD[:-1] + ', "messages": []}', r"key 'messages' stands twice"),
    "role twice": ('{"messages": [{"role": "user", "content": "q", "role": "system"}]}', r"key 'role' stands twice"),
    "NaN": (with_part(type="video", video=[], fps=float("nan")), r"NaN is not a JSON value"),
    "infinity": (with_part(type="video", video=[], fps=-float("inf")), r"-Infinity is not a JSON value"),
    "too large": (with_part(type="video", video=[], fps=1.5).replace("1.5", "1e999"), r"1e999 is too large"),
    "half a pair": (line(messages=[{"role": "user", "content": "\ud800"}]), r"message 0 \(user\): .*surrogate"),
    "integer too large": (with_part(type="video", video=[], fps=7).replace("7", "7" * 5000), r"7{80} is too large"),
    "NUL": ('{"messages": "\x00"}', r"one JSON object on the line"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_line_is_refused_by_file_line_and_place(tmp_path: Path, bad: str, message: str) -> None:
    path = write_lines(tmp_path / "train.jsonl", GOOD, "", bad, GOOD)
    with pytest.raises(VLBridgeError, match=rf"^{path}, line 3: .*{message}"):
        read_conversations(path)
    with pytest.raises(VLBridgeError, match=rf"^train data {path}, line 3: "):
        read_conversations(path, split="train")


@pytest.mark.parametrize("tag", ["<image>", "<video>", "<audio>", "<image_1>", "<image 2>", "<|image_1|>", "<|image|>"])
def test_a_tag_of_another_format_is_refused_unless_it_is_meant(tmp_path: Path, tag: str) -> None:
    for content in (f"{tag}what?", [{"type": "text", "text": tag[:3]}, {"type": "text", "text": f"{tag[3:]}\nwhat?"}]):
        path = write_lines(tmp_path / "train.jsonl", line(messages=[{"role": "user", "content": content}, TALK[1]]))
        with pytest.raises(
            VLBridgeError, match=r"line 1: message 0 \(user\): the text holds .*\"type\": \"image\""
        ) as error:
            read_conversations(path)
        assert repr(tag) in str(error.value)
        assert read_conversations(path, literal_tags=True)[0][0]["content"] == content


def test_the_option_that_the_refusal_of_a_tag_names_is_an_argument(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", line(messages=[{"role": "user", "content": "<image>"}]))
    with pytest.raises(VLBridgeError, match="--literal-tags"):
        read_conversations(path)
    parser = make_parser(add_arguments)
    assert [parser.parse_args(words).literal_tags for words in ([], ["--literal-tags"])] == [False, True]


def test_a_path_in_media_tags_is_refused_and_markup_is_not(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for tag, text in {
        "<img>": "<img>a.png</img> what?",
        "<video>": "<video>my clip.mp4 </video>",
        "<audio>": "<audio>set/1</audio>",
        "<image>": "<video>\n<p></p></video><image>./</image>",
        "<image_00>": "</image><image_00>",
    }.items():
        write_lines(path, line(messages=[{"role": "user", "content": text}]))
        with pytest.raises(VLBridgeError, match=f"'{tag}'"):
            read_conversations(path)
    texts = [
        "<video>\n<source src='a'></video>",
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


def test_paths_are_resolved_and_addresses_are_not(tmp_path: Path) -> None:
    sources = {
        "a.png": str(tmp_path / "a.png"),
        "../b:1.png": str(tmp_path / "../b:1.png"),
        "/c.png": "/c.png",
        **{name: name for name in ("http://x/a.png", "https://x/a", "data:image/png;base64,AAAA", "file:///a.png", "s3://b/a")},
    }  # fmt: skip
    write_lines(tmp_path / "train.jsonl", *(with_part(type="image", image=source) for source in sources))
    read = read_conversations(tmp_path / "train.jsonl")
    assert [conversation[0]["content"][1]["image"] for conversation in read] == list(sources.values())


def test_a_file_that_is_missing_empty_or_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for missing in (path, tmp_path):
        with pytest.raises(VLBridgeError, match=rf"^{missing}: no file that can be read"):
            read_conversations(missing)
    path.write_text("\n \n")
    with pytest.raises(VLBridgeError, match=r"train.jsonl: expected at least one conversation"):
        read_conversations(path)
    path.write_bytes(GOOD.encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(VLBridgeError, match=r"train.jsonl, line 2: expected UTF-8 text, found .* at byte 14"):
        read_conversations(path)
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(VLBridgeError, match=r"train.jsonl, line 1: expected UTF-8 text"):
        read_conversations(path)
