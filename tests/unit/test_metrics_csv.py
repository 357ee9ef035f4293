"""The CSV file of a run: what is written is read back, a resumed run replaces rows, invalid files are rejected."""

import math
from pathlib import Path

import pytest

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.metrics.columns import COLUMNS
from megatron_vlbridge.training.metrics.csv_file import CsvFile, check_new_file, read_rows

HEADER = ",".join(COLUMNS)


def write(path: Path, *iterations: int) -> CsvFile:
    file = CsvFile(path)
    for iteration in iterations:
        file.append({"iteration": iteration, "lm_loss": iteration / 3})
    return file


def iterations(path: Path) -> list[float]:
    return [row["iteration"] for row in read_rows(path)]


@pytest.mark.parametrize("value", [0, 1, 3, 1 / 3, 1e-300, 2**53, 5.0, -2.5, math.inf])
def test_a_value_is_read_back_exactly(tmp_path: Path, value: float) -> None:
    CsvFile(tmp_path / "m.csv").append({"iteration": 7, "lm_loss": value, "images": None})
    assert read_rows(tmp_path / "m.csv") == [{"iteration": 7, "lm_loss": value}]


def test_a_nan_is_kept(tmp_path: Path) -> None:
    CsvFile(tmp_path / "m.csv").append({"iteration": 7, "lm_loss": math.nan})
    assert math.isnan(read_rows(tmp_path / "m.csv")[0]["lm_loss"])


def test_the_file_has_a_header_and_a_line_for_each_row(tmp_path: Path) -> None:
    file = write(tmp_path / "m.csv", 1)
    lines = (tmp_path / "m.csv").read_text().splitlines()
    assert lines[0] == HEADER
    assert lines[1].split(",")[:3] == ["1", "", repr(1 / 3)]
    place = file.path.stat().st_ino
    file.append({"iteration": 2})
    assert iterations(tmp_path / "m.csv") == [1, 2]
    # The rows before are not written again.
    assert file.path.stat().st_ino == place


@pytest.mark.parametrize(("first", "kept"), [(4, [1, 2, 3]), (3, [1, 2]), (2, [1]), (1, []), (9, [1, 2, 3])])
def test_a_resumed_run_replaces_rows_from_its_first_iteration(tmp_path: Path, first: int, kept: list[int]) -> None:
    write(tmp_path / "m.csv", 1, 2, 3)
    before = {row["iteration"]: row for row in read_rows(tmp_path / "m.csv")}
    write(tmp_path / "m.csv", first, first + 1)
    assert iterations(tmp_path / "m.csv") == [*kept, first, first + 1]
    assert all(row == before[row["iteration"]] for row in read_rows(tmp_path / "m.csv")[: len(kept)])
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_a_line_that_was_not_finished_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    write(path, 1, 2)
    text = path.read_text()
    path.write_text(text[:-5])
    assert iterations(path) == [1]
    write(path, 3)
    assert iterations(path) == [1, 3]


ROW = "5" + "," * (len(COLUMNS) - 1)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("", "line 1: expected the header iteration,seconds,lm_loss"),
        ("a,b\n1,2\n", "found 'a,b'"),
        (f"{HEADER}\n{ROW}\n5,6\n", f"line 3: expected {len(COLUMNS)} values, found 2"),
        (f"{HEADER}\n{ROW}\n{ROW}\n", "line 3: expected an iteration after 5, found 5; several runs"),
        (f"{HEADER}\n{ROW}\n{'4' + ROW[1:]}\n", "expected an iteration after 5, found 4"),
        (f"{HEADER}\n{ROW.replace('5,', '5,x', 1)}\n", "line 2, seconds: expected a number, found 'x'"),
        (f"{HEADER}\n{ROW[1:]}\n", "line 2, iteration: expected an integer of at least 1, found ''"),
        (f"{HEADER}\n{'0' + ROW[1:]}\n", "found '0'"),
        (f"{HEADER}\n{'1.5' + ROW[1:]}\n", "found '1.5'"),
        (f"{HEADER}\n{'nan' + ROW[1:]}\n", "found 'nan'"),
        (f"{HEADER}\n{'inf' + ROW[1:]}\n", "found 'inf'"),
    ],
)
def test_an_invalid_file_is_rejected_with_its_name_and_line(tmp_path: Path, text: str, stated: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(VLBridgeError) as rejected:
        read_rows(path)
    assert str(path) in str(rejected.value)
    assert stated in str(rejected.value)
    with pytest.raises(VLBridgeError):
        write(path, 1)
    assert path.read_text() == text


def test_other_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name, stated in (("none.csv", "no such file"), ("binary.csv", "expected a text file"), (".", "a text file")):
        with pytest.raises(VLBridgeError, match=stated):
            read_rows(tmp_path / name)


def test_a_new_run_needs_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    check_new_file(path, resumes=False)
    write(path, 1)
    check_new_file(path, resumes=True)
    with pytest.raises(VLBridgeError, match=r"m\.csv: expected a new file, .* --load"):
        check_new_file(path, resumes=False)
    path.write_text(f"{HEADER}\n")
    check_new_file(path, resumes=False)
    path.write_text("other\n")
    with pytest.raises(VLBridgeError, match="line 1: expected the header"):
        check_new_file(path, resumes=True)
    with pytest.raises(VLBridgeError, match=r"found no .*nowhere; create it"):
        check_new_file(tmp_path / "nowhere" / "m.csv", resumes=True)
