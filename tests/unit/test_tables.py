"""Tables as sources: rows of Parquet files and of saved datasets, in any order, with images in the table."""

import json
import os
import pickle
import random
import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLVideoProcessor

from megatron_vlbridge.data.media import load_image, load_video
from megatron_vlbridge.data.sources.files.kinds import open_records
from megatron_vlbridge.data.sources.files.tables import DatasetRows, ParquetRows
from megatron_vlbridge.data.sources.mixture import open_data
from tests.errors import rejects
from tests.video_writer import moving, write_video

ROWS: list[dict[str, Any]] = [
    {"q": f"q{n}", "a": f"a{n}", "file": {"bytes": bytes([n]), "path": None}, "n": None if n % 2 else n}
    for n in range(25)
]


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS, size: int = 4) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=size)
    return path


def write_dataset(folder: Path, *parts: list[dict[str, Any]]) -> Path:
    """What `datasets.Dataset.save_to_disk` of datasets 5.2 writes, as far as it is read."""
    folder.mkdir(parents=True)
    schema, files = pa.Table.from_pylist(parts[0]).schema, []
    for number, rows in enumerate(parts):
        files.append({"filename": f"data-{number:05}-of-{len(parts):05}.arrow"})
        with pa.ipc.new_stream(str(folder / files[-1]["filename"]), schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema), max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
    return folder


def nested(row: dict[str, Any]) -> dict[str, Any]:
    """What is read of a row: without nulls in the struct."""
    return {**row, "file": {"bytes": row["file"]["bytes"]}}


@pytest.fixture(params=["file", "folder", "dataset"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> ParquetRows | DatasetRows:
    if request.param == "file":
        return ParquetRows(write_parquet(tmp_path / "a.parquet"))
    if request.param == "dataset":
        return DatasetRows(write_dataset(tmp_path / "a", ROWS[:10], ROWS[10:11], ROWS[11:]))
    (tmp_path / "a").mkdir()
    for number, part in enumerate((ROWS[:10], ROWS[10:11], ROWS[11:])):
        write_parquet(tmp_path / "a" / f"train-{number:05}-of-00003.parquet", part)
    return ParquetRows(tmp_path / "a")


@pytest.mark.parametrize("damage", ["page", "text"])
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    """A damaged page, or a text that is not UTF-8; the rows of other groups are read."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4, compression="none")
    content = bytearray(path.read_bytes())
    if damage == "page":
        column = pq.ParquetFile(path).metadata.row_group(1).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    else:
        place = content.index(b"q5")
        content[place : place + 1] = b"\xff"
    path.write_bytes(content)
    records = ParquetRows(path, name="x")
    assert [records[index]["q"] for index in (0, 3, 8)] == ["q0", "q3", "q8"]
    with rejects("the file is damaged", start="x, row 5: cannot read the row"):
        records[5]


def test_rows_are_read_in_any_order(rows: ParquetRows | DatasetRows) -> None:
    expected = [nested(row) for row in ROWS]
    assert list(rows) == expected
    order = list(range(-25, 25)) * 2
    random.Random(0).shuffle(order)
    assert [rows[index] for index in order] == [expected[index] for index in order]
    assert rows[20:3:-7] == expected[20:3:-7]
    assert pickle.loads(pickle.dumps(rows))[7] == expected[7]
    with pytest.raises(IndexError):
        rows[25]
    child = os.fork()
    if child == 0:
        os._exit(0 if list(rows) == expected else 1)
    assert list(rows) == expected
    assert os.waitpid(child, 0)[1] == 0


def test_errors_name_file_and_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    assert ParquetRows(path, name="train data x").location(6) == "train data x, row 6"
    folder = write_dataset(tmp_path / "set", ROWS[:10], ROWS[10:])
    rows = DatasetRows(folder)
    assert [rows.location(index) for index in (9, 10)] == [
        f"{folder}/data-00000-of-00002.arrow, row 9",
        f"{folder}/data-00001-of-00002.arrow, row 0",
    ]
    meta = tmp_path / "meta.yaml"
    columns = {"user": "q", "assistant": "a", "image": "file"}
    meta.write_text(json.dumps({"train": [{"path": "a.parquet", "form": "columns", "columns": columns}]}))
    with rejects("unknown key 'n'", start=f"train data {path}, row 6: "):
        (open_data(meta) or [])[6]


def test_images_and_messages_in_a_table_are_those_of_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content := BytesIO(), "png")
    image = {"bytes": content.getvalue(), "path": "a.png"}
    texts = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "A cat."}]
    # In Arrow, each part of a message has the keys of all.
    question = [{"type": "image", "image": "a.png", "text": None}, {"type": "text", "image": None, "text": "Who?"}]
    answer = [{"type": "text", "image": None, "text": "A cat."}]
    parts = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name, row in {
        "tags": {"messages": texts, "images": [image]},
        "text": {"messages": texts[1:], "images": None},
        "messages": {"messages": parts},
    }.items():
        write_parquet(tmp_path / f"{name}.parquet", [row])
        write_dataset(tmp_path / name, [row])
    for ending in ("", ".parquet"):
        tags, messages = (open_data(tmp_path / f"{name}{ending}") for name in ("tags", "messages"))
        assert tags is not None
        assert messages is not None
        for read in (tags[0], messages[0]):
            first, second = read[0]["content"]
            assert np.array_equal(np.array(load_image(first)), pixels)
            assert second == {"type": "text", "text": "Who?"}
            assert read[1]["role"] == "assistant"
    text = open_data(tmp_path / "text")
    assert text is not None
    assert text[0] == texts[1:]


def test_a_folder_or_file_of_another_kind_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with rejects("expected a folder saved by `datasets`, or with Parquet or tar files", start="x: "):
        open_records(tmp_path / "empty", name="x")
    for split in ("train", "test"):
        write_dataset(tmp_path / "dict" / split, ROWS)
        write_parquet(tmp_path / "empty" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "dict" / "dataset_dict.json").write_text("{}")
    with rejects("expected one split of the dataset, name one of its folders: test, train", start="x: "):
        open_records(tmp_path / "dict", name="x")
    with rejects("expected files of one split, found those of test, train", start="x: "):
        open_records(tmp_path / "empty", name="x")
    (tmp_path / "a.parquet").write_text("{}")
    with rejects("expected a Parquet file, a.parquet is none", start="x: "):
        open_records(tmp_path / "a.parquet", name="x")
    cut = tmp_path / "dict" / "test" / "data-00000-of-00001.arrow"
    for damage, problem in ((b"{}", "expected an Arrow stream"), (b"", "expected an Arrow stream")):
        cut.write_bytes(damage)
        with rejects(problem, start="x: "):
            open_records(cut.parent, name="x")
    for text in ("{", "{}", "[]", '{"_data_files": [{}]}'):
        (cut.parent / "state.json").write_text(text)
        with rejects("expected a saved dataset, state.json is invalid", start="x: "):
            open_records(cut.parent, name="x")


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with rejects('the package pyarrow is not installed, which reads tables: pip install -e ".[parquet]"', start="x: "):
        open_records(path, name="x")


def test_videos_in_a_table_are_those_of_the_files(tmp_path: Path) -> None:
    file = write_video(tmp_path / "a.mp4", moving(12), fps=4)
    row = {"q": "Who?", "a": "A cat.", "clip": {"bytes": file.read_bytes(), "path": None}}
    write_parquet(tmp_path / "a.parquet", [row])
    source = {"path": "a.parquet", "form": "columns", "columns": {"user": "q", "assistant": "a", "video": "clip"}}
    (tmp_path / "meta.yaml").write_text(json.dumps({"train": [source]}))
    [conversation] = open_data(tmp_path / "meta.yaml") or []
    read = partial(load_video, video_processor=Qwen3VLVideoProcessor())
    found, expected = read(conversation[0]["content"][0]), read({"type": "video", "video": file})
    assert torch.equal(found.frames, expected.frames)
    assert found.metadata == expected.metadata


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    for number in (0, 2):
        write_parquet(tmp_path / f"train-{number:05}-of-00003.parquet")
    with rejects("expected 3 files, as their names say, found 2; put all of them there, or name those", start="x: "):
        ParquetRows(tmp_path, name="x")
    write_parquet(tmp_path / "train-00001-of-00003.parquet")
    assert len(ParquetRows(tmp_path)) == 3 * len(ROWS)


def test_parts_written_by_spark_are_one_split(tmp_path: Path) -> None:
    for number in range(2):
        write_parquet(tmp_path / f"part-{number:05}-1c2d3e4f-aaaa-bbbb-cccc-0123456789ab-c000.snappy.parquet")
    assert len(ParquetRows(tmp_path)) == 2 * len(ROWS)
    write_parquet(tmp_path / "part-0-test.parquet")
    with rejects("expected files of one split", start="x: "):
        ParquetRows(tmp_path, name="x")


@pytest.mark.parametrize(
    "other",
    [
        "b.jsonl",
        "b.tar.gz",
        "b.PARQUET",
        "more/b.parquet",
        "b.tar",
        "b.csv",
        "b.TGZ",
        "b.tsv",
        "b.arrow",
        "b.jsonl.zst",
        "more/b.tar",
    ],
)
def test_a_folder_with_data_that_is_not_read_is_rejected(tmp_path: Path, other: str) -> None:
    write_parquet(tmp_path / "a.parquet")
    for name in (
        "README.md",
        "dataset_info.json",
        "_SUCCESS",
        "images/a.png",
        "images.zip",
        ".ipynb/a.parquet",
        "_metadata.parquet.crc",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(open_records(tmp_path, name="x")) == len(ROWS)
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).touch()
    with rejects(start=f"x: {other} would not be read: expected a folder of files that end with .parquet alone"):
        open_records(tmp_path, name="x")


def test_a_file_that_two_sources_read_is_rejected(tmp_path: Path) -> None:
    """One that a folder does not read may be another source."""
    for name in ("a", "b"):
        (tmp_path / "f" / name).mkdir(parents=True)
    write_parquet(tmp_path / "f" / "a.parquet")
    (tmp_path / "f" / "b.json").write_text('[{"messages": [{"role": "user", "content": "q"}]}]')
    meta = tmp_path / "meta.yaml"
    meta.write_text("train: [{path: f}, {path: f/b.json}]")
    assert len(open_data(meta) or []) == len(ROWS) + 1
    meta.write_text("train: [{path: f}, {path: f/b/../a.parquet}]")
    with rejects(f"train: {tmp_path}/f/a.parquet is read by two sources", start=f"{meta}: "):
        open_data(meta)


def test_a_selection_of_a_saved_dataset_is_rejected(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", ROWS)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with rejects("a selection of its rows, which would be ignored", start="x: "):
        DatasetRows(folder, name="x")


def test_a_value_that_python_cannot_represent_is_named(tmp_path: Path) -> None:
    table = pa.table({"q": ["a"], "t": pa.array([2**62], pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "a.parquet")
    with rejects("has values that Python cannot represent", start="x, row 0: cannot read the row"):
        ParquetRows(tmp_path / "a.parquet", name="x")[0]
