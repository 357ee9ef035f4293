"""The form of a conversation: whatever would have no effect is refused by its name."""

from typing import Any

import pytest

from megatron_vlbridge.data.messages import check_conversation
from megatron_vlbridge.errors import VLBridgeError

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
def test_the_form_that_is_documented_is_accepted(messages: list) -> None:
    check_conversation(messages)


UNREAD = ["max_pixels", "min_pixels", "total_pixels", "resized_height", "resized_width", "nframes", "min_frames"]
UNREAD += ["max_frames", "video_start", "video_end", "sample_fps", "raw_fps", "train", "cache_control", "detail"]


@pytest.mark.parametrize("key", UNREAD)
@pytest.mark.parametrize("part", [IMAGE, VIDEO, TEXT], ids=lambda part: part["type"])
def test_a_key_of_a_part_that_nothing_reads_is_refused(part: dict, key: str) -> None:
    for value in (1, None):
        with pytest.raises(VLBridgeError, match=rf"message 0 \(user\), part 1, {part['type']}: unknown key '{key}'"):
            check_conversation(user(TEXT, {**part, key: value}))


UNREAD_OF_MESSAGE = ["tool_calls", "reasoning_content", "name", "loss", "weight", "train", "images", "videos", "id"]


@pytest.mark.parametrize("key", UNREAD_OF_MESSAGE)
def test_a_key_of_a_message_that_nothing_reads_is_refused(key: str) -> None:
    for value in ([], None, 0):
        with pytest.raises(VLBridgeError, match=rf"message 1: unknown key '{key}' \(known: 'role', 'content'\)"):
            check_conversation(assistant(**{key: value}))


@pytest.mark.parametrize(
    ("messages", "remedy"),
    [
        (assistant(images=["a.png"]), r'\{"type": "image", "image": "a.png"\}'),
        (user({"type": "image", "url": "a.png"}), r"path belongs under"),
        (user({**IMAGE, "video": "a.mp4"}), r"unknown key 'video' .*each image and video as a content part"),
        (assistant(reasoning_content="hm"), r"'<think>\\n\.\.\.\\n</think>\\n\\n\.\.\.'"),
        (assistant(tool_calls=[]), r"tools are not supported"),
        (user({**TEXT, "max_pixels": 1, "train": 0}), r"unknown key 'max_pixels', 'train' .*remove it"),
        ([{"from": "human", "value": "q"}], r"unknown key 'from', 'value' .*expected 'role' and 'content'"),
    ],
)
def test_the_refusal_of_a_key_shows_what_is_wanted(messages: list, remedy: str) -> None:
    with pytest.raises(VLBridgeError, match=remedy):
        check_conversation(messages)


REFUSED = {
    "nothing": (None, r"a list of messages, found nothing"),
    "text": ("hello", r"a list of messages, found str 'hello'"),
    "no message": ([], r"at least one message"),
    "message as text": (["q"], r"message 0: expected an object"),
    "no role": ([{"content": "q"}], r"message 0: expected 'role' .* found nothing"),
    "role": ([{"role": "tool", "content": "x"}], r"message 0: .*one of system, user, assistant, found str 'tool'"),
    "role as list": ([{"role": ["user"], "content": "x"}], r"message 0: expected 'role'"),
    "content null": (assistant(content=None), r"message 1 \(assistant\): expected 'content' .*found nothing"),
    "content missing": ([{"role": "user"}], r"message 0 \(user\): expected 'content'"),
    "content as number": (assistant(content=3), r"message 1 \(assistant\): expected 'content'.*found int"),
    "content as object": (assistant(content=TEXT), r"message 1 \(assistant\): expected 'content'.*found dict"),
    "no part": (assistant(content=[]), r"message 1 \(assistant\): expected 'content'.*at least one part"),
    "part as text": (user(TEXT, "q"), r"message 0 \(user\), part 1: expected an object of type text, image or video"),
    "part without type": (user({"image": "a.png"}), r"part 0: expected an object of type"),
    "audio": (user({"type": "audio", "audio": "x"}), r"part 0: expected an object of type"),
    "image_url": (user({"type": "image_url", "image_url": {"url": "x"}}), r"part 0: expected an object of type"),
    "type as list": (user({"type": ["text"], "text": "q"}), r"part 0: expected an object of type"),
    "text missing": (user({"type": "text"}), r"part 0: expected a string under 'text', found nothing"),
    "text null": (user({"type": "text", "text": None}), r"part 0: expected a string under 'text', found nothing"),
    "image in an answer": (assistant(content=[IMAGE]), r"message 1 \(assistant\), part 0: expected text, found image"),
    "video in a system": ([{"role": "system", "content": [VIDEO]}], r"message 0 \(system\), part 0: .*found video"),
    "half a surrogate pair": (assistant(content="ab\ud800c"), r"message 1 \(assistant\): .*'\\ud800', at character 2"),
    "half a pair in a part": (user(TEXT, {**TEXT, "text": "\udc80"}), r"part 1: .*surrogate"),
}


@pytest.mark.parametrize(("messages", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_another_form_is_refused_where_it_stands(messages: Any, message: str) -> None:
    with pytest.raises(VLBridgeError, match=message):
        check_conversation(messages)
