"""The code blocks of README.md and docs/*.md, fenced and indented."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDENT = "    "


@dataclass(frozen=True)
class Block:
    """A block of code, without its fence or indentation; `line` is that of its first line of code, from 1."""

    page: str
    line: int
    text: str

    @property
    def first(self) -> str:
        """What names the block on its page."""
        return self.text.splitlines()[0]

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}: {self.first}"


def all_blocks() -> list[Block]:
    """Of every page."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [block for page in pages for block in blocks(str(page.relative_to(ROOT)), page.read_text())]


def blocks(page: str, text: str) -> Iterator[Block]:
    """Of one page, in order."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        if fence := re.match(r" *(```+|~~~+)", lines[number]):
            code = list(takewhile(lambda line: line.strip() != fence[1], lines[number + 1 :]))
            yield Block(page, number + 2, "\n".join(code) + "\n")
            number += len(code) + 2
        elif lines[number].startswith(INDENT) and not (number and lines[number - 1].strip()):
            code = list(takewhile(lambda line: line.startswith(INDENT) or not line.strip(), lines[number:]))
            yield Block(page, number + 1, "\n".join(line[len(INDENT) :] for line in code).rstrip() + "\n")
            number += len(code)
        else:
            number += 1
