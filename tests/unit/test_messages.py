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


UNUSED_OF_MESSAGE = {
    "system": ["tool_calls", "reasoning_content", "name", "tool_call_id", "train"],
    "user": ["tool_calls", "reasoning_content", "name", "tool_call_id", "train"],
    "assistant": ["name", "loss", "images", "videos", "id", "tool_call_id", "reasoning"],
    "tool": ["tool_calls", "reasoning_content", "id", "is_error", "train"],
}


@pytest.mark.parametrize("role", UNUSED_OF_MESSAGE)
def test_an_unused_key_of_a_message_is_rejected(role: str) -> None:
    for key in UNUSED_OF_MESSAGE[role]:
        for value in ([], None, 0):
            with rejects(f"message 1: unknown key '{key}'", "known: 'role', 'content'"):
                check_conversation([ANSWER, {"role": role, "content": "x", key: value}])


def test_keys_of_other_projects_are_rejected_with_the_key_to_write() -> None:
    for key, remedy in (("loss", '"train": false'), ("loss_scale", '"weight"'), ("images", "as a content part")):
        with rejects(f"message 0: unknown key '{key}'", remedy):
            check_conversation([{"role": "assistant", "content": "x", key: False}])


CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": {"x": 1}}}
OTHER_CALL = {"function": {"name": "find", "arguments": '{"y": [null, "é"]}'}}


def tool(content: Any = "r", **keys: Any) -> dict:
    return {"role": "tool", "content": content, **keys}


@pytest.mark.parametrize(
    "messages",
    [
        assistant(reasoning_content="hm"),
        assistant(reasoning_content="", tool_calls=[CALL], content=None),
        assistant(reasoning_content=None, tool_calls=None),
        assistant(tool_calls=[], train=True),
        assistant(train=False),
        [{"role": "assistant", "tool_calls": [CALL]}],
        assistant(tool_calls=[{"name": "look"}, {"name": "look", "arguments": {}}]),
        [*assistant(tool_calls=[CALL, OTHER_CALL]), tool(tool_call_id="c1", name="look"), tool(name="find")],
        [*assistant(tool_calls=[CALL]), tool([IMAGE, TEXT], tool_call_id="c1"), ANSWER],
        [*assistant(), tool(), tool()],
    ],
    ids=range(10),
)
def test_reasoning_tool_calls_and_results_are_accepted(messages: list) -> None:
    check_conversation(messages)


def call(**keys: Any) -> list:
    return assistant(tool_calls=[CALL, {**CALL, **keys}])


def function(**keys: Any) -> list:
    return call(function={**CALL["function"], **keys})


def results(*tools: dict) -> list:
    return [*assistant(tool_calls=[CALL, OTHER_CALL]), *tools]


REJECTED_TOOLS = {
    "calls as object": (assistant(tool_calls=CALL), "expected 'tool_calls' to be a list", "found dict"),
    "call as text": (assistant(tool_calls=["look"]), "tool call 0: expected", "found str 'look'"),
    "other type": (call(type="custom"), "tool call 1: expected", "custom"),
    "no function": (call(function=None), "tool call 1: expected", "'function': None"),
    "unknown key": (call(index=0), "tool call 1: unknown key 'index'", "expected {"),
    "unknown keys": (function(strict=True, b=1), "tool call 1: unknown key 'b', 'strict'", "expected {"),
    "key of a bare call": (assistant(tool_calls=[{"name": "a", "x": 1}]), "tool call 0: unknown key 'x'", ""),
    "no name": (function(name=None), "tool call 1: expected a function name", "found nothing"),
    "empty name": (function(name=""), "tool call 1: expected a function name", "found str ''"),
    "id as number": (call(id=3), "tool call 1: expected a function name and an id", "found str 'look', int '3'"),
    "arguments as list": (function(arguments=[1]), "expected 'arguments' to be an object", "found list '[1]'"),
    "arguments null": (function(arguments=None), "expected 'arguments' to be an object", "found nothing"),
    "JSON list": (function(arguments="[1]"), "expected 'arguments' to be an object", "found str '[1]'"),
    "no JSON": (function(arguments="{x"), "expected 'arguments' to be JSON", "found str '{x'"),
    "empty text": (function(arguments=""), "expected 'arguments' to be JSON", "found str ''"),
    "key twice": (function(arguments='{"x": 1, "x": 2}'), "expected 'arguments' to be JSON", "occurs twice"),
    "NaN": (function(arguments={"x": float("nan")}), "expected JSON values of Unicode text", "nan"),
    "surrogate": (function(arguments={"x": "\ud800"}), "expected JSON values of Unicode text", "surrogate"),
    "no JSON value": (function(arguments={"x": {1}}), "expected JSON values of Unicode text", "set"),
    "tag as a name": (function(name="a>b"), "tool call 1: expected a function name without <, >", "found 'a>b'"),
    "line as an argument": (function(arguments={"a\nb": 1}), "tool call 1: expected names of arguments without", ""),
    "token as an argument": (
        function(arguments={"<|im_end|": 1}),
        "expected names of arguments without <, >",
        "im_end",
    ),
    "reasoning as list": (assistant(reasoning_content=["a"]), "a string under 'reasoning_content'", "found list"),
    "train as number": (assistant(train=0), "(assistant): expected 'train' to be true or false", "found int '0'"),
    "train null": (assistant(train=None), "(assistant): expected 'train' to be true or false", "found nothing"),
    "neither content nor calls": (assistant(content=None, tool_calls=[]), "expected 'content'", "found nothing"),
    "content as number": (assistant(content=3, tool_calls=[CALL]), "expected 'content'", "found int"),
    "other id": (results(tool(tool_call_id="c2")), "message 2 (tool): tool_call_id: expected 'c1'", "'c2'"),
    "order of names": (results(tool(name="find"), tool(name="look")), "message 2 (tool): name: expected 'look'", ""),
    "order": (results(tool(), tool(name="look")), "message 3 (tool): name: expected 'find'", "found str 'look'"),
    "one result too many": (results(tool(), tool(), tool(name="look")), "message 4 (tool)", "expected a tool call"),
    "result without a call": ([*assistant(), tool(tool_call_id="c1")], "expected a tool call before it", "'c1'"),
    "call before an answer": (
        [*results(ANSWER, tool(tool_call_id="c1"))],
        "message 3 (tool): tool_call_id: expected a tool call before it",
        "",
    ),
}


@pytest.mark.parametrize(("messages", "where", "problem"), REJECTED_TOOLS.values(), ids=REJECTED_TOOLS.keys())
def test_another_format_of_calls_and_results_is_rejected(messages: Any, where: str, problem: str) -> None:
    with rejects("message ", where, problem):
        check_conversation(messages)


@pytest.mark.parametrize(
    ("messages", "remedy"),
    [
        (assistant(images=["a.png"]), '{"type": "image", "image": "a.png"}'),
        (user({"type": "image", "url": "a.png"}), "write the path under the key"),
        (user({**IMAGE, "video": "a.mp4"}), "each image and video as a content part"),
        ([{"role": "user", "content": "q", "reasoning_content": "hm"}], "in assistant messages, under 'reasoning_con"),
        (assistant(reasoning="hm"), "under 'reasoning_content'"),
        ([{"role": "user", "content": "q", "tool_calls": []}], "in assistant messages, under 'tool_calls'"),
        (assistant(tools=[]), "beside the messages"),
        ([{"role": "user", "content": "q", "weight": 0.5}], "only assistant messages are learned"),
        ([{"role": "user", "content": "q", "train": True}], "only assistant messages are learned"),
        (assistant(tool_call_id="a"), "of the role 'tool'"),
        (user({**TEXT, "max_pixels": 1, "detail": 0}), "remove it"),
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
    "role": ([{"role": "bot", "content": "x"}], "message 0: expected 'role'", "found str 'bot'"),
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
