r"""Conversations with options of what is learned: the cases of `label_cases`, continued."""

from megatron_vlbridge.data.labels.options import LabelOptions
from tests.label_cases import (
    Case,
    bot,
    families,
    instruct,
    learned,
    result,
    system,
    text,
    thinking,
    thought,
    turn,
    user,
)
from tests.label_cases_tools import JSON_LOOK, LOOK, NO_RESULTS, TAGS_LOOK, Q, R, response

LAST = {"labels": LabelOptions(turns="last")}
TALK = [user("Q"), bot("A"), user("R"), bot("B")]
REASONED = [bot("A", reasoning_content="hm"), bot("B", reasoning_content="so")]
AGENT = [user("Q"), bot("A"), user("R"), bot("", tool_calls=LOOK), result("a"), bot("B")]
RESULT = "<tool_response>\na\n</tool_response>"

CASES = {
    "last": Case(
        TALK,
        instruct(Q + turn("assistant", "A") + R + learned("B"), Q + turn("assistant", "A") + R + thought("B")),
        LAST,
    ),
    "last, without a user": Case(
        [system("S"), bot("A"), bot("B")],
        instruct(turn("system", "S") + learned("A") + learned("B"), ("No user query",)),
        LAST,
    ),
    "last, cut before the answer": Case(
        TALK[:3], instruct(Q + turn("assistant", "A") + R, Q + turn("assistant", "A") + R), LAST
    ),
    "last, with results": Case(
        AGENT,
        families(
            NO_RESULTS,
            Q + turn("assistant", "A") + R + learned(JSON_LOOK) + response("a") + learned("B"),
            Q + turn("assistant", "A") + R + thought(TAGS_LOOK) + response("a") + thought("B"),
        ),
        LAST,
    ),
    "last, with a result as a user message": Case(
        [user("Q"), bot("A"), user(f" {RESULT}\n"), bot("B"), user(text("<tool_"), text("response></tool_response>"))],
        instruct(
            Q + learned("A") + turn("user", f" {RESULT}\n") + learned("B") + response("").replace("\n\n", ""),
            Q + thought("A") + turn("user", RESULT) + thought("B") + response("").replace("\n\n", ""),
        ),
        LAST,
    ),
    "last, half a result is a query": Case(
        [user("Q"), bot("A"), user("<tool_response>"), bot("B"), user("</tool_response>"), bot("C")],
        instruct(
            Q
            + turn("assistant", "A")
            + turn("user", "<tool_response>")
            + turn("assistant", "B")
            + turn("user", "</tool_response>")
            + learned("C"),
            Q
            + turn("assistant", "A")
            + turn("user", "<tool_response>")
            + turn("assistant", "B")
            + turn("user", "</tool_response>")
            + thought("C"),
        ),
        LAST,
    ),
    "train false": Case(
        [user("Q"), bot("A", train=False), user("R"), bot("B", train=True), bot("C", train=False), bot("D")],
        instruct(
            Q + turn("assistant", "A") + R + learned("B") + turn("assistant", "C") + learned("D"),
            Q
            + turn("assistant", "A")
            + R
            + thought("B")
            + turn("assistant", "<think>\n\n</think>\n\nC")
            + thought("D"),
        ),
    ),
    "train false in the last turn": Case(
        [user("Q"), bot("", tool_calls=LOOK), result("a"), bot("B", train=False)],
        families(
            NO_RESULTS,
            Q + learned(JSON_LOOK) + response("a") + turn("assistant", "B"),
            Q + thought(TAGS_LOOK) + response("a") + turn("assistant", "<think>\n\n</think>\n\nB"),
        ),
    ),
    "last and train false": Case(
        [user("Q"), bot("A", train=True), user("R"), bot("B", train=False), bot("C")],
        instruct(
            Q + turn("assistant", "A") + R + turn("assistant", "B") + learned("C"),
            Q + turn("assistant", "A") + R + turn("assistant", "<think>\n\n</think>\n\nB") + thought("C"),
        ),
        LAST,
    ),
    "last, reasoning": Case(
        [user("Q"), REASONED[0], user("R"), REASONED[1]],
        families(
            ("does not render 'reasoning_content'",),
            ("does not render 'reasoning_content'",),
            Q + turn("assistant", "A") + R + thinking("so\n</think>\n\nB"),
        ),
        LAST,
    ),
}  # fmt: skip

NEWLINE = {"labels": LabelOptions(newline=True)}


def with_newline(turn: str) -> str:
    """The same turn, its last newline learned."""
    return turn.removesuffix("⟧\n") + "\n⟧"


CASES |= {
    "newline": Case(
        [user("Q"), bot("A"), user("R"), bot("B\n")],
        instruct(
            Q + with_newline(learned("A")) + R + with_newline(learned("B\n")),
            Q + turn("assistant", "A") + R + turn("assistant", "<think>\n\n</think>\n\nB"),
        ),
        NEWLINE,
    ),
    "newline, train false": Case(
        [user("\n"), bot("A", train=False), bot("B"), user("\n"), bot("C", train=False)],
        instruct(
            turn("user", "\n")
            + turn("assistant", "A")
            + with_newline(learned("B"))
            + turn("user", "\n")
            + turn("assistant", "C"),
            turn("user", "")
            + turn("assistant", "A")
            + turn("assistant", "B")
            + turn("user", "")
            + turn("assistant", "<think>\n\n</think>\n\nC"),
        ),
        NEWLINE,
    ),
    "newline, with a call": Case(
        [user("Q"), bot("I look.", tool_calls=LOOK), result("a"), bot("B")],
        families(
            NO_RESULTS,
            Q + with_newline(learned(f"I look.\n{JSON_LOOK}")) + response("a") + with_newline(learned("B")),
            Q + with_newline(thought(f"I look.\n\n{TAGS_LOOK}")) + response("a") + with_newline(thought("B")),
        ),
        NEWLINE,
    ),
}  # fmt: skip
