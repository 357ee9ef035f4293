"""Parse the code blocks of README.md and docs/*.md, fenced and indented."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDENT = "    "


@dataclass(frozen=True)
class Block:
    """A code block without its fence or indentation; `line` is the line number of its first line of code, from 1.

    `fenced`: it has a fence, and is not indented.
    """

    page: str
    line: int
    text: str
    fenced: bool

    @property
    def first(self) -> str:
        """The first line, which identifies the block on its page."""
        return self.text.splitlines()[0]

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}: {self.first}"


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [block for page in pages for block in blocks(str(page.relative_to(ROOT)), page.read_text())]


def blocks(page: str, text: str) -> Iterator[Block]:
    """The blocks of one page, in order."""
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        if fence := re.match(r" *(```+|~~~+)", lines[index]):
            code = list(takewhile(lambda line: line.strip() != fence[1], lines[index + 1 :]))
            yield Block(page, index + 2, "\n".join(code) + "\n", True)
            index += len(code) + 2
        elif lines[index].startswith(INDENT) and not (index and lines[index - 1].strip()):
            code = list(takewhile(lambda line: line.startswith(INDENT) or not line.strip(), lines[index:]))
            yield Block(page, index + 1, "\n".join(line[len(INDENT) :] for line in code).rstrip() + "\n", False)
            index += len(code)
        else:
            index += 1
