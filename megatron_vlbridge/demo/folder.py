"""The folder of results: what the demo writes there, and when it may be written again."""

from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from megatron_vlbridge.errors import VLBridgeError

MARKER = ".megatron-vlbridge-demo"


@dataclass(frozen=True)
class Folder:
    """Names inside the folder of results."""

    root: Path

    @property
    def data(self) -> Path:
        """Conversations (JSON lines) and their images."""
        return self.root / "data"

    @property
    def hf_start(self) -> Path:
        """The Hugging Face checkpoint with random weights."""
        return self.root / "hf-start"

    @property
    def megatron_start(self) -> Path:
        """The same weights as a Megatron checkpoint."""
        return self.root / "megatron-start"

    @property
    def megatron_trained(self) -> Path:
        """What Megatron's pretrain saved."""
        return self.root / "megatron-trained"

    @property
    def hf_trained(self) -> Path:
        """The trained weights as a Hugging Face checkpoint."""
        return self.root / "hf-trained"

    @property
    def logs(self) -> Path:
        """All output of the processes that the demo started."""
        return self.root / "logs"

    @property
    def loss(self) -> Path:
        """The plot of the loss."""
        return self.root / "loss.png"

    @property
    def answers(self) -> Path:
        """The plot of the held-out digits with the answers."""
        return self.root / "answers.png"

    @property
    def report(self) -> Path:
        """What was done, and what came out."""
        return self.root / "report.md"

    @property
    def contents(self) -> tuple[Path, ...]:
        """All that the demo writes."""
        checkpoints = (self.hf_start, self.megatron_start, self.megatron_trained, self.hf_trained)
        return (self.data, *checkpoints, self.logs, self.loss, self.answers, self.report)

    def prepare(self) -> None:
        """Make the folder, or remove what an earlier run of the demo left in it; nothing else is touched.

        Raises:
            VLBridgeError: there is something under this name that no demo has written.
        """
        if (self.root / MARKER).is_file():
            for path in self.contents:
                _remove(path)
        elif self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise VLBridgeError(
                f"{self.root}: expected no such folder, an empty one or the result of an earlier demo, found something "
                "else. Nothing was changed. Choose another name with --out."
            )
        self.logs.mkdir(parents=True)
        (self.root / MARKER).write_text(
            "Written by the demo, which may replace its own files here.\n", encoding="utf-8"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        rmtree(path)
    else:
        path.unlink(missing_ok=True)
