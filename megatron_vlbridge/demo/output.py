"""Where the demo writes: the folder of results, and the terminal with a headline and a few notes for each stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import TextIO

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.log_lines import duration

MARKER = ".megatron-vlbridge-demo"
STAGES = 8
LORA_STAGES = 10
INDENT = " " * 6
ERASE = "\r\x1b[2K"
# On a stream that keeps every line (a file, a CI log), the moving line is written this often.
SECONDS_BETWEEN_LINES = 10.0


class Folder:
    """Names inside the folder of results; `contents` are all that the demo writes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"  # conversations (JSON lines) and their images
        self.hf_start = root / "hf-start"  # the Hugging Face checkpoint with random weights
        self.megatron_start = root / "megatron-start"  # the same weights as a Megatron checkpoint
        self.megatron_trained = root / "megatron-trained"  # what Megatron's pretrain saved
        self.hf_trained = root / "hf-trained"  # the trained weights as a Hugging Face checkpoint
        self.megatron_adapters = root / "megatron-adapters"  # the adapters that Megatron's pretrain saved
        self.adapter = root / "adapter"  # the same adapters as a folder of peft
        self.hf_merged = root / "hf-merged"  # the trained weights with the adapters merged into them
        self.logs = root / "logs"  # all output of the processes that the demo started
        self.loss = root / "loss.png"
        self.answers = root / "answers.png"
        self.report = root / "report.md"
        checkpoints = (self.hf_start, self.megatron_start, self.megatron_trained, self.hf_trained)
        adapters = (self.megatron_adapters, self.adapter, self.hf_merged)
        self.contents = (self.data, *checkpoints, *adapters, self.logs, self.loss, self.answers, self.report)

    def prepare(self) -> None:
        """Make the folder, or remove what an earlier run of the demo left in it; nothing else is touched.

        Raises VLBridgeError: there is something under this name that no demo has written.
        """
        if (self.root / MARKER).is_file():
            for path in self.contents:
                if path.is_dir() and not path.is_symlink():
                    rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        elif self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise VLBridgeError(
                f"{self.root}: expected no such folder, an empty one or the result of an earlier demo, found something "
                "else. Nothing was changed. Choose another name with --out."
            )
        self.logs.mkdir(parents=True)
        (self.root / MARKER).write_text(
            "Written by the demo, which may replace its own files here.\n", encoding="utf-8"
        )


class Progress:
    """Writes the `stages` to `stream` and keeps the seconds that each took in `seconds`.

    Example:
        >>> progress = Progress(sys.stdout)
        >>> with progress.stage("Import"):
        ...     progress.note("demo-out/megatron-start")
        [1/8] Import
              demo-out/megatron-start
              0.0 s
    """

    def __init__(self, stream: TextIO, stages: int = STAGES) -> None:
        self.seconds: dict[str, float] = {}
        self._stages = stages
        self._stream = stream
        self._moves = stream.isatty()
        self._last_line = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """The headline before, and the time after; a stage that fails has no time."""
        self._print(f"[{len(self.seconds) + 1}/{self._stages}] {title}")
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
