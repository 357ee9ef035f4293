"""CSV files as sources: the rows that Python's csv module reads, at random, with the line of each."""

import csv
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlbridge.data.sources.files.csv_rows import DELIMITERS, CsvRows
from megatron_vlbridge.data.sources.mixture import open_data
from tests.errors import rejects

CELLS = st.text(st.sampled_from('aä"\n,;\t \u2028'), max_size=6)


ENDS = st.sampled_from(["\n", "\r\n"])


@given(st.lists(st.tuples(CELLS, CELLS)), st.sampled_from(sorted(DELIMITERS)), ENDS, st.booleans())
def test_every_row_is_found(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], suffix: str, end: str, mark: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    with path.open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=DELIMITERS[suffix], lineterminator=end)
        writer.writerows([("q ä", "b"), *rows])
    read = CsvRows(path, small=10**9)
    expected = [{"q ä": first or None, "b": second or None} for first, second in rows]
    assert list(read) == expected
    assert list(pickle.loads(pickle.dumps(read))) == expected


def test_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,a\n\n"1\n\n2",x\n\n3,y\n4\n')
    for _ in range(2):
        read = CsvRows(path, small=0)
        assert read[:2] == [{"q": "1\n\n2", "a": "x"}, {"q": "3", "a": "y"}]
        assert [read.location(index) for index in range(3)] == [f"{path}, line {line}" for line in (3, 7, 8)]
        with rejects("expected 2 cells (q, a), found 1", start=f"{path}, line 8: "):
            read[2]
    assert (tmp_path / "a.csv.index").exists()


def test_a_table_of_questions_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,file\nWho?,A cat.,a.png\nWhere?,Here.,\n")
    columns = "{user: question, assistant: answer, image: file}"
    (tmp_path / "meta.yaml").write_text(f"train: [{{path: a.csv, form: columns, columns: {columns}}}]")
    read = open_data(tmp_path / "meta.yaml")
    assert read is not None
    image = {"type": "image", "image": str(tmp_path / "a.png")}
    assert read[0][0]["content"] == [image, {"type": "text", "text": "Who?"}]
    assert read[1] == [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ": expected a header with the names of the columns"),
        (b"\n\n", ": expected a header with the names of the columns"),
        (b"q,a,q\n1,2,3\n", ": the column 'q' is there twice"),
        (b'q,a\n1,2\n"1"2,3\n', ", line 3: expected a row of CSV, found an error: "),
        (b'q,a\n1,2\n"1,3\n4,5\n', ", line 3: expected a row of CSV, found an error: unexpected end of data"),
        (b"q,a\r1,2\r", ", line 1: expected a row of CSV, found an error: "),
        (b"q,a\n1," + b"x" * 2**24 + b"y\n", ", line 2: expected a row of CSV, found an error: field larger than"),
    ],
    ids=range(7),
)
def test_a_file_that_is_not_csv_is_rejected(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with rejects(start=f"train data{problem}"):
        CsvRows(tmp_path / "a.csv", name="train data")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("header", ["q;a\n1;2\n", "sep=;\nq;a\n"])
def test_another_delimiter_is_named(tmp_path: Path, suffix: str, header: str) -> None:
    """As Excel writes in some countries."""
    path = tmp_path / f"a{suffix}"
    path.write_text(header)
    with rejects("found ';'; save it as .csv with commas, or", start=f"{path}, line 1: expected cells separated by"):
        CsvRows(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\ufeffq,a\r\n1,2\r\n", encoding=encoding)
    with rejects("found UTF-16; save the file as UTF-8", start=f"{path}: "):
        CsvRows(path)


def test_line_ends_that_csv_does_not_have_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"q,a\r1,2\r")
    with rejects("; end lines with LF or CRLF, not with CR alone"):
        CsvRows(tmp_path / "a.csv")


def test_cells_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    """In another process, too."""
    (tmp_path / "a.csv").write_text(f"q,a\n1,{'x' * 200_000}\n3,4\n")
    csv.field_size_limit(2**30)
    read = CsvRows(tmp_path / "a.csv")
    assert csv.field_size_limit(2**17) == 2**30, "a limit that is larger stays"
    read = CsvRows(tmp_path / "a.csv")
    csv.field_size_limit(2**17)
    for rows in (pickle.loads(pickle.dumps(read)), read):
        assert list(rows) == [{"q": "1", "a": "x" * 200_000}, {"q": "3", "a": "4"}]


def test_another_encoding_is_rejected_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("q,a\n1,2\n1,ä\n".encode("latin-1"))
    with rejects("expected UTF-8 text, found", start=f"{tmp_path / 'a.csv'}, line 3: "):
        CsvRows(tmp_path / "a.csv")[1]
    (tmp_path / "a.csv").write_bytes("q,ä\n1,2\n".encode("latin-1"))
    with rejects("expected UTF-8 text, found", "save the file as UTF-8", start=f"{tmp_path / 'a.csv'}, line 1: "):
        CsvRows(tmp_path / "a.csv")
