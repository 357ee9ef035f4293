"""The format of a conversation: keys that would have no effect are rejected by name."""

from typing import Any

import pytest

from megatron_vlbridge.data.messages import check_conversation
from tests.errors import rejects

ANSWER = {"role": "assistant", "content": "a"}


def user(*parts: Any) -> list:
    return [{"role": "user", "content": list(parts)}, ANSWER]


def assistant(**keys: Any) -> list:
    return [{"role": "user", "content": "q"}, {**ANSWER, **keys}]


IMAGE = {"type": "image", "image": "a.png"}
VIDEO = {"type": "video", "video": ["a.png", "b.png"], "fps": 2}
TEXT = {"type": "text", "text": "q"}


@pytest.mark.parametrize(
    "messages",
    [user(TEXT), user(IMAGE, TEXT, VIDEO, IMAGE), user({**TEXT, "text": ""}), assistant(content=[TEXT, TEXT])],
)
def test_the_documented_format_is_accepted(messages: list) -> None:
    check_conversation(messages)


UNUSED = ["max_pixels", "min_pixels", "total_pixels", "resized_height", "resized_width", "nframes", "min_frames"]
UNUSED += ["max_frames", "video_start", "video_end", "sample_fps", "raw_fps", "train", "cache_control", "detail"]


USED = {
    "text": (),
    "image": ("min_pixels", "max_pixels"),
    "video": (*("min_pixels", "max_pixels", "total_pixels"), "min_frames", "max_frames", "video_start", "video_end"),
}


@pytest.mark.parametrize("key", UNUSED)
@pytest.mark.parametrize("part", [IMAGE, VIDEO, TEXT], ids=lambda part: part["type"])
def test_an_unused_key_of_a_part_is_rejected(part: dict, key: str) -> None:
    if key in USED[part["type"]]:
        check_conversation(user(TEXT, {**part, key: 1}))
        return
    for value in (1, None):
        with rejects(f"message 0 (user), part 1, {part['type']}", f"unknown key '{key}'"):
            check_conversation(user(TEXT, {**part, key: value}))


UNUSED_OF_MESSAGE = ["tool_calls", "reasoning_content", "name", "loss", "weight", "train", "images", "videos", "id"]


@pytest.mark.parametrize("key", UNUSED_OF_MESSAGE)
def test_an_unused_key_of_a_message_is_rejected(key: str) -> None:
    for value in ([], None, 0):
        with rejects(f"message 1: unknown key '{key}'", "known: 'role', 'content'"):
            check_conversation(assistant(**{key: value}))


@pytest.mark.parametrize(
    ("messages", "remedy"),
    [
        (assistant(images=["a.png"]), '{"type": "image", "image": "a.png"}'),
        (user({"type": "image", "url": "a.png"}), "write the path under the key"),
        (user({**IMAGE, "video": "a.mp4"}), "each image and video as a content part"),
        (assistant(reasoning_content="hm"), r"'<think>\n...\n</think>\n\n...'"),
        (assistant(tool_calls=[]), "tools are not supported"),
        (user({**TEXT, "max_pixels": 1, "train": 0}), "remove it"),
        ([{"from": "human", "value": "q"}], "expected 'role' and 'content'"),
    ],
)
def test_an_unknown_key_is_rejected_with_the_remedy(messages: list, remedy: str) -> None:
    with rejects("unknown key", remedy):
        check_conversation(messages)


def test_all_unknown_keys_are_named() -> None:
    with rejects("unknown key 'max_pixels', 'train'"):
        check_conversation(user({**TEXT, "max_pixels": 1, "train": 0}))


USER, MODEL = "message 0 (user)", "message 1 (assistant)"
REJECTED = {
    "nothing": (None, "a list of messages", "found nothing"),
    "text": ("hello", "a list of messages", "found str 'hello'"),
    "no message": ([], "", "at least one message"),
    "message as text": (["q"], "message 0", "expected an object"),
    "no role": ([{"content": "q"}], "message 0: expected 'role'", "found nothing"),
    "role": ([{"role": "tool", "content": "x"}], "message 0: expected 'role'", "found str 'tool'"),
    "role as list": ([{"role": ["user"], "content": "x"}], "message 0: expected 'role'", "found list"),
    "content null": (assistant(content=None), f"{MODEL}: expected 'content'", "found nothing"),
    "content missing": ([{"role": "user"}], f"{USER}: expected 'content'", "found nothing"),
    "content as number": (assistant(content=3), f"{MODEL}: expected 'content'", "found int"),
    "content as object": (assistant(content=TEXT), f"{MODEL}: expected 'content'", "found dict"),
    "no part": (assistant(content=[]), f"{MODEL}: expected 'content'", "at least one part"),
    "part as text": (user(TEXT, "q"), f"{USER}, part 1: expected an object", "found str 'q'"),
    "part without type": (user({"image": "a.png"}), "part 0: expected an object", "of type text, image or video"),
    "audio": (user({"type": "audio", "audio": "x"}), "part 0: expected an object", "audio"),
    "image_url": (user({"type": "image_url", "image_url": {"url": "x"}}), "part 0: expected an object", "image_url"),
    "type as list": (user({"type": ["text"], "text": "q"}), "part 0: expected an object", "of type text"),
    "text missing": (user({"type": "text"}), "part 0: expected a string under 'text'", "found nothing"),
    "text null": (user({"type": "text", "text": None}), "part 0: expected a string under 'text'", "found nothing"),
    "image in an answer": (assistant(content=[IMAGE]), f"{MODEL}, part 0", "expected text, found image"),
    "video in a system": ([{"role": "system", "content": [VIDEO]}], "message 0 (system), part 0", "found video"),
    "lone surrogate": (assistant(content="ab\ud800c"), f"{MODEL}: expected Unicode", r"'\ud800', at character 2"),
    "lone surrogate in a part": (user(TEXT, {**TEXT, "text": "\udc80"}), "part 1: expected Unicode", "surrogate"),
}


@pytest.mark.parametrize(("messages", "where", "problem"), REJECTED.values(), ids=REJECTED.keys())
def test_another_format_is_rejected_with_its_location(messages: Any, where: str, problem: str) -> None:
    with rejects(where, problem):
        check_conversation(messages)
