"""A table of the sizes of conversations, and its file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_vlbridge.errors import VLBridgeError

FORMAT = 1
# Tokens; patches; work in the vision tower; assistant turns, and those of them that are excluded from the loss.
COLUMNS = np.dtype(
    [("tokens", "<i4"), ("patches", "<i4"), ("work", "<i8"), ("assistant_turns", "<i4"), ("excluded_turns", "<i4")]
)


class Excluded(NamedTuple):
    """The first assistant turn excluded from the loss: the index of its conversation, and where and why."""

    conversation: int
    text: str


@dataclass(frozen=True, eq=False)
class LengthTable:
    """The sizes of N conversations: `rows` has the dtype `COLUMNS` and shape `[N]`.

    Example: `LengthTable.open("train.jsonl.lengths", fingerprint).rows["tokens"].sum()`.
    """

    rows: np.ndarray
    first_excluded: Excluded | None = None

    @classmethod
    def join(cls, parts: Sequence["LengthTable"]) -> "LengthTable":
        """The tables of consecutive conversations as one."""
        starts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
        excluded = [
            Excluded(start + part.first_excluded.conversation, part.first_excluded.text)
            for start, part in zip(starts, parts, strict=False)
            if part.first_excluded
        ]
        return cls(np.concatenate([part.rows for part in parts]), excluded[0] if excluded else None)

    def save(self, path: str | Path, fingerprint: Mapping[str, Any]) -> None:
        """Write the table to a file, which appears only when it is complete."""
        partial = Path(f"{path}.partial-{os.getpid()}")
        head = {"format": FORMAT, "fingerprint": fingerprint, "first_excluded": self.first_excluded}
        try:
            with partial.open("wb") as file:
                np.save(file, self.rows)
                file.write(json.dumps(head).encode())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path, fingerprint: Mapping[str, Any]) -> "LengthTable":
        """Read a table that was saved for this fingerprint; its rows are mapped into memory.

        Raises VLBridgeError: the file is missing, incomplete or of another format, or its fingerprint differs (the
        error names the keys that do).
        """
        rows, head = _read(Path(path))
        found = head["fingerprint"]
        names = sorted(key for key in found.keys() | fingerprint.keys() if found.get(key) != fingerprint.get(key))
        if names:
            key = names[0]
            raise VLBridgeError(
                f"{path}: made for other data or settings; {', '.join(names)} differ ({key}: expected "
                f"{fingerprint.get(key)!r}, found {found.get(key)!r}); {REMEDY}"
            )
        excluded = head["first_excluded"]
        return cls(rows, Excluded(*excluded) if excluded else None)


REMEDY = "make it again with vlbridge data index"


def _read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        rows = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            file.seek(rows.offset + rows.nbytes)
            head = json.loads(file.read())
        if head["format"] == FORMAT and rows.dtype == COLUMNS and rows.ndim == 1:
            return rows, head
    except FileNotFoundError as error:
        raise VLBridgeError(f"{path}: no such file; {REMEDY}") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise VLBridgeError(f"{path}: not a complete table of lengths ({error}); {REMEDY}") from error
    raise VLBridgeError(f"{path}: expected a table of lengths of format {FORMAT}, found another; {REMEDY}")
