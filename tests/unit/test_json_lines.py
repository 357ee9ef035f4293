"""JSON Lines at random: the lines that Python's own iteration gives, through an index that is never stale."""

import json
import os
import pickle
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlbridge.data.sources.files.json_lines import BYTE_ORDER_MARK, JsonLines, scan_lines
from megatron_vlbridge.data.sources.files.json_list import JsonList, scan_list
from megatron_vlbridge.data.sources.mixture import open_data
from tests.errors import rejects

LINES = st.lists(
    st.sampled_from([b"", b" ", b"\r", b"\t\x0b\x0c \r", b"1", b" 2", b'"\\u2028\xe2\x80\xa8"', b"[\r3]", b"x" * 40])
)


def expected_rows(content: bytes) -> list[tuple[int, int, bytes]]:
    """By Python's iteration: number, begin and bytes of the lines that are not blank."""
    mark = len(BYTE_ORDER_MARK) if content.startswith(BYTE_ORDER_MARK) else 0
    found, begin = [], mark
    for number, line in enumerate(content[mark:].split(b"\n"), 1):
        if line.strip():
            found.append((number, begin, line))
        begin += len(line) + 1
    return found


@given(LINES, st.booleans(), st.integers(1, 60))
def test_every_line_that_is_not_blank_is_found_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], mark: bool, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    content = BYTE_ORDER_MARK * mark + b"\n".join(lines)
    path.write_bytes(content)
    rows = np.concatenate([np.empty((0, 3), np.int64), *scan_lines(path, chunk)]).tolist()
    assert [(number, begin, content[begin:end]) for begin, end, number in rows] == expected_rows(content)


def numbers(path: Path, count: int, start: int = 0) -> Path:
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(start, start + count)))
    return path


def test_a_line_is_read_at_random(tmp_path: Path) -> None:
    lines = JsonLines(numbers(tmp_path / "a.jsonl", 1000))
    assert len(lines) == 1000
    assert lines[-1] == {"n": 999}
    assert lines[np.int64(7)] == {"n": 7}
    assert lines[3:9:2] == [{"n": 3}, {"n": 5}, {"n": 7}]
    assert list(lines) == [{"n": n} for n in range(1000)]
    for index in (1000, -1001):
        with pytest.raises(IndexError):
            lines[index]


def test_threads_forks_and_copies_read_the_same(tmp_path: Path) -> None:
    lines = JsonLines(numbers(tmp_path / "a.jsonl", 3000), small=0)
    expected = [{"n": n} for n in range(3000)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lines.__getitem__, range(3000))) == expected
    copy = pickle.loads(pickle.dumps(lines))
    assert list(copy) == expected
    assert copy.location(3) == lines.location(3)
    child = os.fork()
    if child == 0:
        os._exit(0 if list(lines) == expected else 1)
    assert list(lines) == expected
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were scanned."""
    found: list[Path] = []

    def scan(path: Path) -> Iterator[np.ndarray]:
        found.append(path)
        yield from scan_lines(path)

    monkeypatch.setattr("megatron_vlbridge.data.sources.files.json_lines.scan_lines", scan)
    return found


def test_the_index_is_built_once(tmp_path: Path, scans: list[Path]) -> None:
    path = numbers(tmp_path / "a.jsonl", 50)
    for _ in range(3):
        assert list(JsonLines(path, small=0)) == [{"n": n} for n in range(50)]
    assert scans == [path]
    index = tmp_path / "a.jsonl.index"
    assert index.stat().st_size == 48 + 50 * 24
    assert stat.S_IMODE(index.stat().st_mode) == 0o644
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index"]
    JsonLines(path)
    assert not (numbers(tmp_path / "b.jsonl", 5).with_name("b.jsonl.index")).exists()
    assert len(scans) == 2, "a small file is scanned each time, without an index"


def test_a_stale_index_is_built_again(tmp_path: Path, scans: list[Path]) -> None:
    path = numbers(tmp_path / "a.jsonl", 400, start=100)
    JsonLines(path, small=0)
    before = path.stat()

    def times() -> None:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def first_bytes() -> None:  # same size, same time
        path.write_text("[1,\n 222, 33]\n" + path.read_text()[14:])
        times()

    def last_bytes() -> None:
        path.write_text(path.read_text()[:-2] + "\n}")
        times()

    def size() -> None:
        path.write_text(path.read_text() + '{"n": 7}')
        times()

    for change in (first_bytes, last_bytes, size, lambda: os.utime(path, ns=(0, before.st_mtime_ns + 1)), times):
        change()
        count = len(scans)
        rows = JsonLines(path, small=0)._rows.tolist()
        assert len(scans) == count + 1, change
        assert rows == np.concatenate(list(scan_lines(path))).tolist()
    for damage in (b"", b"VLBRECS1", (tmp_path / "a.jsonl.index").read_bytes()[:-8], b"x" * 2000):
        (tmp_path / "a.jsonl.index").write_bytes(damage)
        assert JsonLines(path, small=0)._rows.tolist() == rows


def test_an_index_belongs_to_the_last_bytes_of_a_large_file_and_to_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for end in (b"1\n22", b"11\n2"):
        path.write_bytes(b"[" + b" " * (2 << 20) + b"]\n" + end)
        os.utime(path, ns=(0, 10**18))
        assert len(list(JsonLines(path, small=0))) == 3
        assert JsonLines(path, small=0)[1] == int(end.split()[0])
    path.write_text("[7]\n")
    assert list(JsonLines(path, small=0)) == [[7]]
    assert list(JsonList(path, small=0)) == [7]


def test_the_index_is_written_to_a_folder_of_choice(tmp_path: Path, scans: list[Path]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        numbers(tmp_path / name / "a.jsonl", 3, start=len(name) + len(scans))
    files = [tmp_path / name / "a.jsonl" for name in ("one", "two")]
    for _ in range(2):
        for path in files:
            assert list(JsonLines(path, cache=tmp_path / "new" / "cache", small=0)) == list(JsonLines(path))
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 2
    assert not list(tmp_path.glob("*/*.index"))
    assert len(scans) == 2 + 4


def test_a_folder_that_takes_no_file_is_no_hindrance(tmp_path: Path) -> None:
    path = numbers(tmp_path / "a.jsonl", 3)
    (tmp_path / "file").write_text("")
    assert len(JsonLines(path, cache=tmp_path / "file" / "cache", small=0)) == 3
    (tmp_path / "a.jsonl.index").mkdir()
    assert len(JsonLines(path, small=0)) == 3


def test_a_file_that_changes_while_it_is_read_is_rejected(tmp_path: Path) -> None:
    path = numbers(tmp_path / "a.jsonl", 3)
    lines = JsonLines(path)
    with path.open("a") as file:
        file.write("\n")
    with rejects("the file has changed since it was opened", start=f"{path}, line 1: "):
        lines[0]


ITEMS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(ITEMS), st.sampled_from([None, 1]), st.booleans(), st.booleans(), st.integers(1, 40))
def test_every_item_of_a_list_is_found_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, items: list, indent: int | None, plain: bool, mark: bool, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "list.json"
    text = json.dumps(items, indent=indent, ensure_ascii=plain)
    path.write_bytes(BYTE_ORDER_MARK * mark + f" {text}\n\n".encode(errors="surrogatepass"))
    content = path.read_bytes()
    rows = np.concatenate(list(scan_list(path, chunk)))
    assert [json.loads(content[begin:end].decode(errors="surrogatepass")) for begin, end, _ in rows.tolist()] == items
    assert rows[:, 2].tolist() == list(range(1, len(items) + 1))


def test_a_list_is_read_at_random(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"n": n, "text": "\u00e9]}"} for n in range(20_001)], ensure_ascii=False, indent=1))
    items = JsonList(path, small=0)
    assert [len(items), items[20_000]["n"], items[-3]["text"]] == [20_001, 20_000, "\u00e9]}"]
    assert pickle.loads(pickle.dumps(items))[12_345] == {"n": 12_345, "text": "\u00e9]}"}
    path.write_text('[{"a": 1, "a": 2}]')
    with rejects(start=f"{path}, item 1: key 'a' occurs twice"):
        JsonList(path)[0]
    assert len(JsonLines(numbers(tmp_path / "a.jsonl", 3))) == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1}\n{"a": 2}\n', "found '{' at its start; a file with a JSON object on each line must end with .jsonl"),
        ("", "expected one list, [..., ...], found ''"),
        ("[1, 2", "expected ',' or ']' after item 2, found ''"),
        ("[1 2]", "expected ',' or ']' after item 1, found '2'"),
        ("[1, 2,]", "item 3: expected a JSON value, found Expecting value at byte 6"),
        ("[,]", "item 1: expected a JSON value, found Expecting value at byte 1"),
        ('[1, {"a"}]', "item 2: expected a JSON value, found Expecting ':' delimiter at byte 8"),
        ('[1, "a', "item 2: expected a JSON value, found Unterminated string starting at at byte 4"),
        ("[1] [2]", "expected the end of the file after the list, found '['"),
        ("[" * 200_000, "item 1: expected a JSON value, found too many nesting levels"),
    ],
)
def test_a_file_that_is_not_one_list_is_rejected(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    for small in (0, 1000_000):
        with rejects(problem, start="train data: "):
            JsonList(path, name="train data", small=small)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_list_in_utf_16_is_rejected(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_text("\ufeff[1]" if encoding == "utf-16-be" else "[1]", encoding=encoding)
    with rejects("save the file as UTF-8", start=f"{tmp_path / 'a.json'}: expected UTF-8 text"):
        JsonList(tmp_path / "a.json")


def test_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({}) + "\n\n{\n")
    lines = JsonLines(path)
    assert [lines.location(0), lines.location(1)] == [f"{path}, line 1", f"{path}, line 3"]
    with rejects(start=f"{path}, line 3: expected one JSON object on the line, found '{{'"):
        lines[1]
    with rejects(start="train data x: cannot read the file (No such file"):
        JsonLines(tmp_path / "b.jsonl", name="train data x")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_that_is_named_as_lines_is_rejected_with_the_right_name(tmp_path: Path, indent: int | None) -> None:
    record = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]}
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(json.dumps([record, record], indent=indent))
    with rejects("must end with .json", start=f"train data {tmp_path / 'a.jsonl'}, line 1: "):
        (open_data(tmp_path / "a.jsonl") or [])[0]
    assert list(open_data(tmp_path / "a.json") or []) == [record["messages"]] * 2
