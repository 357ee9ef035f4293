"""Tables of lengths: what is saved is read, damage and other settings are refused, an interrupted run continues."""

import errno
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_vlbridge.data.lengths.build import CHUNK, build_table
from megatron_vlbridge.data.lengths.table import COLUMNS, LengthTable, Note
from megatron_vlbridge.errors import VLBridgeError
from tests.errors import rejects

FINGERPRINT = {"data": ["train.jsonl", 7], "processor": {"patch_size": 16}}


def table(count: int, excluded: int | None = None, first: int = 0, failed: int | None = None) -> LengthTable:
    """Row i has the values i + 1 to i + 6."""
    rows = np.empty(count, COLUMNS)
    for offset, name in enumerate(COLUMNS.names or ()):
        rows[name] = np.arange(first, first + count) + offset + 1
    notes = (None if place is None else Note(place, f"conversation {first + place}") for place in (excluded, failed))
    return LengthTable(rows, *notes)


def same(one: LengthTable, other: LengthTable) -> bool:
    notes = [(each.first_excluded, each.first_failed) for each in (one, other)]
    return np.array_equal(one.rows, other.rows) and notes[0] == notes[1]


@pytest.mark.parametrize(("excluded", "failed"), [(None, None), (3, None), (None, 0), (2, 4)])
def test_what_is_saved_is_read(excluded: int | None, failed: int | None, tmp_path: Path) -> None:
    saved = table(5, excluded, failed=failed)
    saved.save(tmp_path / "lengths", FINGERPRINT)
    read = LengthTable.open(tmp_path / "lengths", FINGERPRINT)
    assert same(read, saved)
    assert isinstance(read.rows, np.memmap)
    assert [path.name for path in tmp_path.iterdir()] == ["lengths"]


def test_a_joined_table_counts_on(tmp_path: Path) -> None:
    parts = [table(2), table(3, 1, first=2), table(1, 0, first=5, failed=0)]
    assert same(LengthTable.join(parts), table(6, 3, failed=5))


def test_every_cut_is_refused(tmp_path: Path) -> None:
    table(2, 1).save(tmp_path / "lengths", FINGERPRINT)
    whole = (tmp_path / "lengths").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with rejects("not a complete table of lengths", "vlbridge data index"):
            LengthTable.open(tmp_path / "cut", FINGERPRINT)


def test_another_fingerprint_is_refused_by_its_keys(tmp_path: Path) -> None:
    table(2).save(tmp_path / "lengths", FINGERPRINT)
    with rejects("data, new differ (data, 1: expected 8, found 7)"):
        LengthTable.open(tmp_path / "lengths", {**FINGERPRINT, "data": ["train.jsonl", 8], "new": 1})
    with rejects("processor differ (processor, size: expected None, found 'nothing')"):
        LengthTable.open(tmp_path / "lengths", {**FINGERPRINT, "processor": {"patch_size": 16, "size": None}})
    with rejects("processor differ (processor, patch_size: expected 'nothing', found 16)"):
        LengthTable.open(tmp_path / "lengths", {**FINGERPRINT, "processor": {}})
    with rejects("data differ (data: expected ['train.jsonl'], found ['train.jsonl', 7])"):
        LengthTable.open(tmp_path / "lengths", {**FINGERPRINT, "data": ["train.jsonl"]})
    with rejects("no such file"):
        LengthTable.open(tmp_path / "none", FINGERPRINT)


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.arange(3))
    with rejects("other.npy"):
        LengthTable.open(tmp_path / "other.npy", FINGERPRINT)


def measure(
    conversations: Sequence[int], indices: range, fails_at: int = -1, log: Path | None = None, unreadable: int = -1
) -> LengthTable:
    """A table like that of `table`, of conversations that are their own index; each call is noted in `log`."""
    if log:
        with log.open("a") as file:
            file.write(f"{indices.start} ")
    if fails_at in indices:
        raise VLBridgeError(f"conversation {fails_at} is broken")
    first = conversations[indices.start]
    measured = table(len(indices), len(indices) - 1 if first else None, first)
    if unreadable in indices:
        measured.rows[unreadable - first] = 0
    return measured


COUNT = 3 * CHUNK + 5


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_measure_each_conversation_once(workers: int, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "lengths"
    built = build_table(
        range(COUNT), measure, path, FINGERPRINT, workers=workers, progress=lambda *counts: seen.append(counts)
    )
    assert same(built, table(COUNT, 2 * CHUNK - 1))
    assert same(LengthTable.open(path, FINGERPRINT), built)
    assert seen == [(count, COUNT) for count in (CHUNK, 2 * CHUNK, 3 * CHUNK, COUNT)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_continues(workers: int, tmp_path: Path) -> None:
    """Not with another fingerprint."""
    path, log = tmp_path / "lengths", tmp_path / "log"
    with rejects(f"conversation {2 * CHUNK + 1} is broken"):
        build_table(range(COUNT), partial(measure, fails_at=2 * CHUNK + 1), path, FINGERPRINT, workers=workers)
    assert not path.exists()
    kept = [int(file.name.partition("-")[0]) for file in path.with_name("lengths.parts").glob("*/*")]
    assert {0, CHUNK} <= set(kept)
    build_table(range(COUNT), partial(measure, log=log), path, FINGERPRINT)
    assert sorted([*kept, *map(int, log.read_text().split())]) == [0, CHUNK, 2 * CHUNK, 3 * CHUNK]
    assert same(LengthTable.open(path, FINGERPRINT), table(COUNT, 2 * CHUNK - 1))


def test_parts_with_failures_are_measured_again(tmp_path: Path) -> None:
    """What failed may have been repaired."""
    path, log = tmp_path / "lengths", tmp_path / "log"
    with_failure = partial(measure, fails_at=COUNT - 1, unreadable=CHUNK + 7)
    with rejects("is broken"):
        build_table(range(COUNT), with_failure, path, FINGERPRINT)
    built = build_table(range(COUNT), partial(measure, log=log), path, FINGERPRINT)
    assert log.read_text().split() == [str(CHUNK), str(3 * CHUNK)]
    assert not built.failed.any()


def test_parts_for_another_fingerprint_are_not_used(tmp_path: Path) -> None:
    path, log = tmp_path / "lengths", tmp_path / "log"
    with rejects("is broken"):
        build_table(range(COUNT), partial(measure, fails_at=COUNT - 1), path, FINGERPRINT)
    build_table(range(COUNT), partial(measure, log=log), path, {**FINGERPRINT, "data": "other"})
    assert len(log.read_text().split()) == 4


@pytest.mark.parametrize("data", ["same", "other"])
def test_another_process_that_writes_the_table_is_refused(tmp_path: Path, data: str) -> None:
    """The first one ends as if it were alone; after it the table can be written again."""
    path = tmp_path / "lengths"

    def second(*counts: int) -> None:
        with rejects("found another run that writes it", start=f"{path}: "):
            build_table(range(COUNT), measure, path, {**FINGERPRINT, "data": data})

    built = build_table(range(COUNT), measure, path, {**FINGERPRINT, "data": "same"}, progress=second)
    assert same(built, table(COUNT, 2 * CHUNK - 1))
    assert list(tmp_path.iterdir()) == [path]
    build_table(range(COUNT), measure, path, {**FINGERPRINT, "data": data})


def test_sizes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with rejects("workers", "0"):
        build_table(range(3), measure, tmp_path / "lengths", FINGERPRINT, workers=0)
    with rejects("at least one conversation"):
        build_table(range(0), measure, tmp_path / "lengths", FINGERPRINT)


def test_a_read_only_folder_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "lengths.parts")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with rejects("cannot write the table of lengths", "write a YAML file with the paths of the sources into a folder"):
        build_table(range(3), measure, tmp_path / "lengths", FINGERPRINT)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with rejects("file/lengths: cannot write the table of lengths"):
        build_table(range(3), measure, tmp_path / "file" / "lengths", FINGERPRINT)
