"""A table of the sizes of conversations, and its file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_vlbridge.data.lengths.turn_counts import TurnCounts
from megatron_vlbridge.errors import VLBridgeError

FORMAT = 1
COLUMNS = np.dtype(
    [
        ("tokens", "<i4"),  # 0: the conversation cannot be encoded
        ("patches", "<i4"),
        ("work", "<i8"),  # in the vision tower
        ("assistant_turns", "<i4"),
        ("excluded_turns", "<i4"),  # of these: the template changes them
        ("skipped_turns", "<i4"),  # of these: not to be learned
    ]
)


NOTHING = "nothing"  # in place of a value that one of two fingerprints lacks
TURNS = ("assistant", "excluded", "skipped")


class Note(NamedTuple):
    """The index of a conversation, and a text with its place and a reason."""

    conversation: int
    text: str


@dataclass(frozen=True, eq=False)
class LengthTable:
    """The sizes of N conversations: `rows` has the dtype `COLUMNS` and shape `[N]`.

    `first_excluded` is the first assistant turn excluded from the loss, `first_failed` the first conversation that
    cannot be encoded.

    Example: `LengthTable.open("train.jsonl.lengths", fingerprint).rows["tokens"].sum()`.
    """

    rows: np.ndarray
    first_excluded: Note | None = None
    first_failed: Note | None = None

    @property
    def failed(self) -> np.ndarray:
        """Which conversations cannot be encoded, bool `[N]`."""
        return np.equal(self.rows["tokens"], 0)

    def count_turns(self, rows: np.ndarray | None = None) -> TurnCounts:
        """The assistant turns in these of its rows, by default in all."""
        chosen = self.rows if rows is None else rows
        assistant, excluded, skipped = (int(chosen[f"{name}_turns"].sum()) for name in TURNS)
        return TurnCounts(assistant, excluded, skipped, self.first_excluded.text if self.first_excluded else "")

    @classmethod
    def join(cls, parts: Sequence["LengthTable"]) -> "LengthTable":
        """The tables of consecutive conversations as one."""
        starts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()

        def first(notes: Sequence[Note | None]) -> Note | None:
            shifted = (Note(start + note[0], note[1]) for start, note in zip(starts, notes, strict=False) if note)
            return next(shifted, None)

        rows = np.concatenate([part.rows for part in parts])
        return cls(rows, first([part.first_excluded for part in parts]), first([part.first_failed for part in parts]))

    def save(self, path: str | Path, fingerprint: Mapping[str, Any]) -> None:
        """Write the table to a file, which appears only when it is complete."""
        partial = Path(f"{path}.partial-{os.getpid()}")
        notes = [self.first_excluded, self.first_failed]
        head = {"format": FORMAT, "fingerprint": fingerprint, "notes": notes}
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
        names = sorted(
            key for key in found.keys() | fingerprint.keys() if found.get(key, NOTHING) != fingerprint.get(key, NOTHING)
        )
        if names:
            where, expected, other = _first_difference(
                names[0], fingerprint.get(names[0], NOTHING), found.get(names[0], NOTHING)
            )
            raise VLBridgeError(
                f"{path}: made for other data or settings; {', '.join(names)} differ ({where}: expected {expected!r}, "
                f"found {other!r}); {REMEDY}"
            )
        return cls(rows, *(Note(*note) if note else None for note in head["notes"]))


def _first_difference(where: str, expected: Any, found: Any) -> tuple[str, Any, Any]:
    """Where two JSON values differ first, such as "sources, 0, media", and what each has there."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        pairs = [(key, expected.get(key, NOTHING), found.get(key, NOTHING)) for key in keys]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = list(zip(map(str, range(len(expected))), expected, found, strict=True))
    else:
        return where, expected, found
    key, expected, found = next(pair for pair in pairs if pair[1] != pair[2])
    return _first_difference(f"{where}, {key}", expected, found)


REMEDY = "make it again with `vlbridge data index`, with the options of the training, or remove it"


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
