"""Media in LMDB databases: the bytes of a key, in every process."""

import io
import json
import os
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLVideoProcessor

from megatron_vlbridge.data.media import load_image, load_video
from megatron_vlbridge.data.sources.files.lmdb_media import read_lmdb
from megatron_vlbridge.data.sources.mixture import open_data
from tests.errors import rejects
from tests.video_writer import moving, write_video

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


@pytest.fixture(params=[True, False], ids=["folder", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    Image.fromarray(PIXELS).save(content := io.BytesIO(), "png")
    path = str(tmp_path / "a.lmdb")
    with lmdb.open(path, subdir=request.param, lock=False) as database, database.begin(write=True) as transaction:
        transaction.put("katze/ä://1".encode(), content.getvalue())
        transaction.put(b"empty", b"")
    record = {"messages": [{"role": "user", "content": "<image>"}], "images": ["a.lmdb::katze/ä://1"]}
    lines = (record, {**record, "images": ["a.lmdb::b"]})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_an_image_of_a_database_is_read_in_every_process(folder: Path) -> None:
    read = open_data(folder / "train.jsonl")
    assert read is not None

    def is_read() -> bool:
        return all(np.array_equal(np.array(load_image(read[0][0]["content"][0])), PIXELS) for _ in range(3))

    assert is_read()
    child = os.fork()
    if child == 0:
        os._exit(0 if is_read() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert read_lmdb("a.lmdb::empty", folder) == b""


def test_a_video_of_a_database_is_that_of_the_file(tmp_path: Path) -> None:
    file = write_video(tmp_path / "a.mp4", moving(12), fps=4)
    with lmdb.open(str(tmp_path / "a.lmdb"), lock=False) as database, database.begin(write=True) as transaction:
        transaction.put(b"clip", file.read_bytes())
    record = {"messages": [{"role": "user", "content": "<video>"}], "videos": ["a.lmdb::clip"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    [[message]] = open_data(tmp_path / "train.jsonl") or []
    processor = Qwen3VLVideoProcessor()
    found = load_video(message["content"][0], video_processor=processor)
    assert torch.equal(found.frames, load_video({"video": file}, video_processor=processor).frames)


def test_what_cannot_be_read_is_rejected_with_the_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = open_data(folder / "train.jsonl")
    assert read is not None
    with rejects("a.lmdb: expected the key 'b', found none", start=f"train data {folder / 'train.jsonl'}, line 2: "):
        read[1]
    (folder / "c.lmdb").write_bytes(b"x" * 10_000)
    for name in ("b", "c"):
        with rejects("cannot read the LMDB database", start=f"{folder / name}.lmdb: "):
            read_lmdb(f"{name}.lmdb::1", folder)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with rejects('the package lmdb is not installed, which reads it: pip install -e ".[lmdb]"'):
        read_lmdb("a.lmdb::1", folder)
