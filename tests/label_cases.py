r"""Conversations, and their texts under published chat templates with the learned spans marked by hand.

In a marked text, `⟦...⟧` is learned. `<|name|>` is a token; a special token that a message has as text is `\<|name|>`.
`IMAGE` is an image of one merged patch.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image

PICTURE = {"type": "image", "image": Image.new("RGB", (64, 64))}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES = {"qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "qwen3_5": "qwen3_5_think"}


class Case(NamedTuple):
    """A conversation, what else it is encoded with, and for each family its marked text or the error."""

    messages: list[dict[str, Any]]
    expected: dict[str, str | tuple[str, ...]]
    options: Mapping[str, Any] = MappingProxyType({})


def text(value: str) -> dict[str, str]:
    """A part."""
    return {"type": "text", "text": value}


def system(content: Any) -> dict[str, Any]:
    """A message."""
    return {"role": "system", "content": content}


def user(*content: Any) -> dict[str, Any]:
    """A message of a text, or of parts."""
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def bot(content: Any, **keys: Any) -> dict[str, Any]:
    """An assistant message."""
    return {"role": "assistant", "content": content, **keys}


def result(*content: Any, **keys: Any) -> dict[str, Any]:
    """A tool message of a text, or of parts."""
    return {**user(*content), "role": "tool", **keys}


def call(name: str, arguments: Any, **keys: Any) -> dict[str, Any]:
    """A tool call in the form of OpenAI."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def turn(role: str, content: str) -> str:
    """A rendered turn without loss."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def learned(content: str) -> str:
    """A rendered assistant turn whose content is learned."""
    return f"<|im_start|>assistant\n⟦{content}<|im_end|>⟧\n"


def thought(content: str) -> str:
    """The same after empty reasoning, which belongs to the generation prompt."""
    return f"<|im_start|>assistant\n<think>\n\n</think>\n\n⟦{content}<|im_end|>⟧\n"


def thinking(content: str) -> str:
    """The same after the start of the reasoning, which belongs to the generation prompt."""
    return f"<|im_start|>assistant\n<think>\n⟦{content}<|im_end|>⟧\n"


DEFAULT_SYSTEM = turn("system", "You are a helpful assistant.")


def families(qwen2_5_vl: Any, qwen3_vl: Any, qwen3_5: Any) -> dict[str, Any]:
    """What is expected of each family."""
    return {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "qwen3_5": qwen3_5}


def instruct(rendered: str, qwen3_5: Any) -> dict[str, Any]:
    """Qwen3-VL; Qwen2.5-VL differs by its own system prompt where the conversation has none."""
    own = "" if rendered.startswith("<|im_start|>system") else DEFAULT_SYSTEM
    return families(own + rendered, rendered, qwen3_5)


Q, R = turn("user", "Q"), turn("user", "R")
NO_REASONING = ("does not render 'reasoning_content'", r"write the reasoning at the start of the content")

CASES = {
    "one turn": Case([user("Q"), bot("A cat.")], instruct(Q + learned("A cat."), Q + thought("A cat."))),
    "two turns": Case(
        [user("Q"), bot("A"), user("R"), bot("B")],
        instruct(Q + learned("A") + R + learned("B"), Q + turn("assistant", "A") + R + thought("B")),
    ),
    "system": Case(
        [system("Be short."), user("Q"), bot("A")],
        instruct(
            turn("system", "Be short.") + Q + learned("A"),
            turn("system", "Be short.") + Q + thought("A"),
        ),
    ),
    "text parts": Case(
        [user(text("Q"), text(" and R")), bot([text("A"), text("nd B")])],
        instruct(turn("user", "Q and R") + learned("And B"), turn("user", "Q and R") + thought("And B")),
    ),
    "images": Case(
        [user(PICTURE, text("Q")), bot("A"), user(text("R"), PICTURE, PICTURE), bot("B")],
        instruct(
            turn("user", f"{IMAGE}Q") + learned("A") + turn("user", f"R{IMAGE}{IMAGE}") + learned("B"),
            turn("user", f"{IMAGE}Q") + turn("assistant", "A") + turn("user", f"R{IMAGE}{IMAGE}") + thought("B"),
        ),
    ),
    "a newline at the start": Case(
        [user("Q"), bot("\nA"), user("R"), bot("B")],
        instruct(
            Q + turn("assistant", "\nA") + R + learned("B"),
            Q + turn("assistant", "A") + R + thought("B"),
        ),
    ),
    "newlines in the middle": Case(
        [user("\n\nQ\n\n\nR\n"), bot("- A\n\n- B\n\n\nC")],
        instruct(
            turn("user", "\n\nQ\n\n\nR\n") + learned("- A\n\n- B\n\n\nC"),
            turn("user", "Q\n\n\nR") + thought("- A\n\n- B\n\n\nC"),
        ),
    ),
    "newlines at the end": Case(
        [user("Q"), bot("A\n\n")], instruct(Q + learned("A\n\n"), Q + turn("assistant", "<think>\n\n</think>\n\nA"))
    ),
    "empty answer": Case([user("Q"), bot("")], instruct(Q + learned(""), Q + thought(""))),
    "two assistant messages": Case(
        [user("Q"), bot("A"), bot("B")],
        instruct(Q + learned("A") + learned("B"), Q + thought("A") + thought("B")),
    ),
    "cut before the answer": Case(
        [user("Q"), bot("A"), user("R")], instruct(Q + learned("A") + R, Q + turn("assistant", "A") + R)
    ),
    "reasoning in the content": Case(
        [user("Q"), bot("<think>\nhm\n</think>\n\nA")],
        instruct(Q + learned("<think>\nhm\n</think>\n\nA"), Q + thinking("hm\n</think>\n\nA")),
    ),
    "reasoning in the content of two turns": Case(
        [user("Q"), bot("<think>\nhm\n</think>\n\nA"), user("R"), bot("<think>\nso\n</think>\n\nB")],
        instruct(
            Q + learned("<think>\nhm\n</think>\n\nA") + R + learned("<think>\nso\n</think>\n\nB"),
            Q + turn("assistant", "A") + R + thinking("so\n</think>\n\nB"),
        ),
    ),
    "reasoning_content": Case(
        [user("Q"), bot("A", reasoning_content="hm"), user("R"), bot("B", reasoning_content="so\n\nyes")],
        families(
            NO_REASONING, NO_REASONING, Q + turn("assistant", "A") + R + thinking("so\n\nyes\n</think>\n\nB")
        ),
    ),
    "reasoning_content with spaces at its end": Case(
        [user("Q"), bot("B", reasoning_content="so ")],
        families(NO_REASONING, NO_REASONING, Q + turn("assistant", "<think>\nso\n</think>\n\nB")),
    ),
    "reasoning in two ways": Case(
        [user("Q"), bot("A", reasoning_content="hm"), user("R"), bot("<think>\nso\n</think>\n\nB")],
        dict.fromkeys(FAMILIES, ("message 3 (assistant): the content starts with '<think>', but message 1 has",)),
    ),
    "reasoning twice": Case(
        [user("Q"), bot("\n<think>\nso\n</think>\n\nB", reasoning_content="")],
        dict.fromkeys(FAMILIES, ("message 1 (assistant): the content starts with '<think>', but message 1 has",)),
    ),
    "a user message that starts with <think>": Case(
        [user("<think> Q"), bot("B", reasoning_content="so")],
        families(NO_REASONING, NO_REASONING, turn("user", "<think> Q") + thinking("so\n</think>\n\nB")),
    ),
    "a literal </think>": Case(
        [user("Q"), bot("write </think> last", reasoning_content="hm </think> hm"), bot("a </think> b")],
        families(
            NO_REASONING,
            NO_REASONING,
            Q + thinking("hm </think> hm\n</think>\n\nwrite </think> last") + thought("a </think> b"),
        ),
    ),
    "a literal </think>, no reasoning": Case(
        [user("Q"), bot("</think> b", reasoning_content="")],
        instruct(Q + learned("</think> b"), Q + thought("</think> b")),
    ),
    "what may be reasoning or a literal </think>": Case(
        [user("Q"), bot("a </think> b")],
        instruct(Q + learned("a </think> b"), Q + turn("assistant", "<think>\na\n</think>\n\n b")),
    ),
    "not in NFC": Case(
        [user("cafe\u0301"), bot("cafe\u0301"), bot("caf\u00e9 😀 日本語")],
        instruct(
            turn("user", "caf\u00e9") + turn("assistant", "caf\u00e9") + learned("caf\u00e9 😀 日本語"),
            turn("user", "caf\u00e9")
            + turn("assistant", "<think>\n\n</think>\n\ncaf\u00e9")
            + thought("caf\u00e9 😀 日本語"),
        ),
    ),
    "two user messages": Case(
        [user("Q"), user("R"), bot("A")], instruct(Q + R + learned("A"), Q + R + thought("A"))
    ),
    "only spaces": Case(
        [user("  "), bot("  ")],
        instruct(turn("user", "  ") + learned("  "), turn("user", "") + turn("assistant", "<think>\n\n</think>\n\n")),
    ),
    "code": Case(
        [user("Q"), bot("```\n<|im_start|\n{{ x }}\r\n\tim_end|>\n```")],
        instruct(
            Q + learned("```\n\\<|im_start|\n{{ x }}\r\n\tim_end|>\n```"),
            Q + thought("```\n\\<|im_start|\n{{ x }}\r\n\tim_end|>\n```"),
        ),
    ),
    "a system message and an image": Case(
        [system([text("Be "), text("short.")]), user(PICTURE), bot("A")],
        instruct(
            turn("system", "Be short.") + turn("user", IMAGE) + learned("A"),
            turn("system", "Be short.") + turn("user", IMAGE) + thought("A"),
        ),
    ),
    "images in every turn, cut": Case(
        [user(PICTURE), bot("A"), user(text("Q"), PICTURE), bot("B"), user(PICTURE)],
        instruct(
            turn("user", IMAGE) + learned("A") + turn("user", f"Q{IMAGE}") + learned("B") + turn("user", IMAGE),
            turn("user", IMAGE)
            + turn("assistant", "A")
            + turn("user", f"Q{IMAGE}")
            + turn("assistant", "B")
            + turn("user", IMAGE),
        ),
    ),
    "three turns": Case(
        [user("Q"), bot("A"), user("R"), bot("B"), user("Q"), bot("A")],
        instruct(
            Q + learned("A") + R + learned("B") + Q + learned("A"),
            Q + turn("assistant", "A") + R + turn("assistant", "B") + Q + thought("A"),
        ),
    ),
    "words of the format as text": Case(
        [user("assistant\nuser\n"), bot("assistant\nA user\nim_start")],
        instruct(
            turn("user", "assistant\nuser\n") + learned("assistant\nA user\nim_start"),
            turn("user", "assistant\nuser") + thought("assistant\nA user\nim_start"),
        ),
    ),
}  # fmt: skip
