r"""Conversations with tools: the cases of `label_cases`, continued."""

from tests.label_cases import (
    IMAGE,
    PICTURE,
    Case,
    bot,
    call,
    families,
    learned,
    result,
    system,
    text,
    thinking,
    thought,
    turn,
    user,
)

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "x": {"é": {}}}}}
TOOL_TEXT = '{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "x": {"é": {}}}}}'

# What the templates write around the tools, copied from their files.
QWEN3_VL_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    f"signatures within <tools></tools> XML tags:\n<tools>\n{TOOL_TEXT}\n</tools>\n\nFor each function call, return a "
    "json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
QWEN3_5_TOOLS = (
    f"# Tools\n\nYou have access to the following functions:\n\n<tools>\n{TOOL_TEXT}\n</tools>\n\nIf you "
    "choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
    "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple "
    "lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow "
    "the specified format: an inner <function=...></function> block must be nested within "
    "<tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n- You may provide optional "
    "reasoning for your function call in natural language BEFORE the function call, but NOT after\n- If "
    "there is no function call available, answer the question like normal with your current knowledge and do "
    "not tell the user about function calls\n</IMPORTANT>"
)
Q, R = turn("user", "Q"), turn("user", "R")
LOOK = [call("look", {"x": "left"})]
JSON_LOOK = '<tool_call>\n{"name": "look", "arguments": {"x": "left"}}\n</tool_call>'
TAGS_LOOK = "<tool_call>\n<function=look>\n<parameter=x>\nleft\n</parameter>\n</function>\n</tool_call>"
FIND = call("find", '{"n":2,"deep":[1,{"é":null}],"on":true,"none":null,"s":"a\\n\\"b\\"","r":0.5}', id="c2")
JSON_FIND = (
    '<tool_call>\n{"name": "find", "arguments": {"n": 2, "deep": [1, {"é": null}], "on": true, "none": null, '
    '"s": "a\\n\\"b\\"", "r": 0.5}}\n</tool_call>'
)
TAGS_FIND = (
    "<tool_call>\n<function=find>\n<parameter=n>\n2\n</parameter>\n<parameter=deep>\n"
    '[1, {"é": null}]\n</parameter>\n<parameter=on>\nTrue\n</parameter>\n<parameter=none>\nNone\n</parameter>\n'
    '<parameter=s>\na\n"b"\n</parameter>\n<parameter=r>\n0.5\n</parameter>\n</function>\n</tool_call>'
)
NO_CALLS = ("message 1 (assistant): the chat template does not render the tool calls", "use a template with tools")
NO_TOOLS = ("tools: the chat template does not render them", "use a template with tools")
NO_RESULTS = ("but the chat template rendered", "consecutive tool messages are expected as one user turn")


def response(*contents: str) -> str:
    """The turn of tool results."""
    return turn("user", "\n".join(f"<tool_response>\n{content}\n</tool_response>" for content in contents))


CASES = {
    "a call": Case(
        [user("Q"), bot("", tool_calls=LOOK)],
        families(NO_CALLS, Q + learned(JSON_LOOK), Q + thought(TAGS_LOOK)),
    ),
    "a call without content": Case(
        [user("Q"), {"role": "assistant", "tool_calls": LOOK}],
        families(NO_CALLS, Q + learned(JSON_LOOK), Q + thought(TAGS_LOOK)),
    ),
    "a call after an empty part": Case(
        [user("Q"), bot([text("")], tool_calls=LOOK)],
        families(NO_CALLS, Q + learned(JSON_LOOK), Q + thought(TAGS_LOOK)),
    ),
    "a call after content": Case(
        [user("Q"), bot("I look.", tool_calls=LOOK)],
        families(NO_CALLS, Q + learned(f"I look.\n{JSON_LOOK}"), Q + thought(f"I look.\n\n{TAGS_LOOK}")),
    ),
    "a call without arguments": Case(
        [user("Q"), bot("", tool_calls=[{"name": "look"}])],
        families(
            NO_CALLS,
            Q + learned('<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'),
            Q + thought("<tool_call>\n<function=look>\n</function>\n</tool_call>"),
        ),
    ),
    "two calls": Case(
        [user("Q"), bot("", tool_calls=[*LOOK, FIND])],
        families(NO_CALLS, Q + learned(f"{JSON_LOOK}\n{JSON_FIND}"), Q + thought(f"{TAGS_LOOK}\n{TAGS_FIND}")),
    ),
    "a result": Case(
        [user("Q"), bot("", tool_calls=LOOK), result("a cat"), bot("A cat.")],
        families(
            NO_RESULTS,
            Q + learned(JSON_LOOK) + response("a cat") + learned("A cat."),
            Q + thought(TAGS_LOOK) + response("a cat") + thought("A cat."),
        ),
    ),
    "two results in one turn": Case(
        [
            user("Q"),
            bot("Both.", tool_calls=[*LOOK, FIND]),
            result("a", name="look"),
            result("b\n", tool_call_id="c2"),
            bot("A, B"),
        ],
        families(
            NO_RESULTS,
            Q + learned(f"Both.\n{JSON_LOOK}\n{JSON_FIND}") + response("a", "b\n") + learned("A, B"),
            Q + thought(f"Both.\n\n{TAGS_LOOK}\n{TAGS_FIND}") + response("a", "b") + thought("A, B"),
        ),
    ),
    "the same result twice, and an empty one": Case(
        [user("Q"), bot("A"), result("a"), result("a"), result(""), bot("B")],
        families(
            (*NO_RESULTS, "rendered 7 (system, user, assistant, tool, tool, tool, assistant)"),
            Q + learned("A") + response("a", "a", "") + learned("B"),
            Q + thought("A") + response("a", "a", "") + thought("B"),
        ),
    ),
    "cut after a result": Case(
        [user("Q"), bot("A"), result("a")],
        families(NO_RESULTS, Q + learned("A") + response("a"), Q + thought("A") + response("a")),
    ),
    "images in results": Case(
        [
            user(PICTURE, text("Q")),
            bot("", tool_calls=LOOK),
            result(PICTURE),
            result(text("see "), PICTURE, PICTURE),
            bot("A"),
        ],
        families(
            NO_RESULTS,
            turn("user", f"{IMAGE}Q") + learned(JSON_LOOK) + response(IMAGE, f"see {IMAGE}{IMAGE}") + learned("A"),
            turn("user", f"{IMAGE}Q") + thought(TAGS_LOOK) + response(IMAGE, f"see {IMAGE}{IMAGE}") + thought("A"),
        ),
    ),
    "tools": Case(
        [user("Q"), bot("", tool_calls=LOOK)],
        families(
            NO_TOOLS,
            turn("system", QWEN3_VL_TOOLS) + Q + learned(JSON_LOOK),
            turn("system", QWEN3_5_TOOLS) + Q + thought(TAGS_LOOK),
        ),
        {"tools": [TOOL]},
    ),
    "tools and a system message": Case(
        [system("Be short."), user("Q"), bot("A")],
        families(
            NO_TOOLS,
            turn("system", f"Be short.\n\n{QWEN3_VL_TOOLS}") + Q + learned("A"),
            turn("system", f"{QWEN3_5_TOOLS}\n\nBe short.") + Q + thought("A"),
        ),
        {"tools": [TOOL]},
    ),
    "no tools": Case(
        [user("Q"), bot("A", tool_calls=[], reasoning_content=None)],
        families(turn("system", "You are a helpful assistant.") + Q + learned("A"), Q + learned("A"), Q + thought("A")),
        {"tools": []},
    ),
    "a call in an earlier turn": Case(
        [user("Q"), bot("", tool_calls=LOOK), result("a"), bot("A"), user("R"), bot("B")],
        families(
            NO_RESULTS,
            Q + learned(JSON_LOOK) + response("a") + learned("A") + R + learned("B"),
            Q + turn("assistant", TAGS_LOOK) + response("a") + turn("assistant", "A") + R + thought("B"),
        ),
    ),
    "a call after reasoning": Case(
        [
            user("Q"),
            bot("I look.", reasoning_content="hm", tool_calls=LOOK),
            result("a"),
            bot(None, reasoning_content="so", tool_calls=[FIND]),
            result("b"),
            bot("A"),
        ],
        families(
            ("does not render 'reasoning_content'",),
            ("does not render 'reasoning_content'",),
            Q
            + thinking(f"hm\n</think>\n\nI look.\n\n{TAGS_LOOK}")
            + response("a")
            + thinking(f"so\n</think>\n\n{TAGS_FIND}")
            + response("b")
            + thought("A"),
        ),
    ),
    "a call after reasoning in the content": Case(
        [user("Q"), bot("<think>\nhm\n</think>\n\n", tool_calls=LOOK)],
        families(
            NO_CALLS,
            Q + learned(f"<think>\nhm\n</think>\n\n\n{JSON_LOOK}"),
            Q + thinking(f"hm\n</think>\n\n{TAGS_LOOK}"),
        ),
    ),
    "a call after content that the template strips": Case(
        [user("Q"), bot(" I look.", tool_calls=LOOK)],
        families(
            NO_CALLS,
            Q + learned(f" I look.\n{JSON_LOOK}"),
            Q + turn("assistant", f"<think>\n\n</think>\n\nI look.\n\n{TAGS_LOOK}"),
        ),
    ),
    "a name that is not JSON": Case(
        [user("Q"), bot("", tool_calls=[call('a"b', {})])],
        families(
            NO_CALLS,
            ("message 1 (assistant): the chat template does not render the tool calls", r'"a\\"b"'),
            Q + thought('<tool_call>\n<function=a"b>\n</function>\n</tool_call>'),
        ),
    ),
}  # fmt: skip
