"""What the terminal shows: a headline for each stage, a few notes below it, and one line that moves."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from megatron_vlbridge.training.log_lines import duration

STAGES = 7
INDENT = " " * 6
ERASE = "\r\x1b[2K"
# On a stream that keeps every line (a file, a CI log), the moving line is written this often.
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Writes the stages to `stream` and keeps the seconds that each took in `seconds`.

    Example:
        >>> progress = Progress(sys.stdout)
        >>> with progress.stage("Import"):
        ...     progress.note("demo-out/megatron-start")
        [1/7] Import
              demo-out/megatron-start
              0.0 s
    """

    def __init__(self, stream: TextIO) -> None:
        self.seconds: dict[str, float] = {}
        self._stream = stream
        self._moves = stream.isatty()
        self._last_line = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """The headline before, and the time after; a stage that fails has no time."""
        self._print(f"[{len(self.seconds) + 1}/{STAGES}] {title}")
        begin = self._last_line = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - begin
        self.note(duration(self.seconds[title]))

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print((INDENT + text).rstrip())

    def live(self, text: str) -> None:
        """A line that the next one replaces, where the stream is a terminal."""
        if self._moves:
            self._stream.write(ERASE + INDENT + text)
            self._stream.flush()
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print(INDENT + text)

    def _print(self, line: str) -> None:
        self._stream.write((ERASE if self._moves else "") + line + "\n")
        self._stream.flush()
