"""WebDataset shards as sources: a sample is what lies in its members, and nothing in it is left out."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlbridge.data.media import load_image, load_video, media_shape
from megatron_vlbridge.data.sources.files.kinds import open_records
from megatron_vlbridge.data.sources.files.shards import MEDIA, Shards, sample_record
from megatron_vlbridge.data.sources.mixture import open_data
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.errors import rejects
from tests.video_writer import moving, write_video

TALK = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A cat."}]


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    Image.fromarray(image(seed)).save(content := io.BytesIO(), "png")
    return content.getvalue()


def write_tar(path: Path, members: dict[str, Any], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, value in members.items():
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            info = tarfile.TarInfo(name)
            if value is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_of_shards_are_read_in_any_order(tmp_path: Path, kind: int) -> None:
    long, expected = "x" * 150, []
    for shard in range(3):
        members: dict[str, Any] = {"dir": None}
        for n in range(4):
            seed = 10 * shard + n
            expected.append(image(seed))
            key = f"dir/{long * (n % 2)}{seed:03}"
            members |= {f"{key}.png": png(seed), f"{key}.json": {"conversations": TALK}}
        write_tar(tmp_path / "set" / f"{shard}.tar", members, kind)
    read = open_data(tmp_path / "set")
    assert read is not None
    assert len(read) == 12
    for index in [11, 0, 5, 5, 4, 7, 3, 8, 1, 2, 6, 9, 10]:
        [user, answer] = pickle.loads(pickle.dumps(read))[index]
        assert np.array_equal(np.array(load_image(user["content"][0])), expected[index])
        assert [user["content"][1]["text"], answer["content"]] == ["\nWho?", "A cat."]
    assert read[7].location == f"train data {tmp_path / 'set'}/1.tar, sample 4"
    assert len(open_records(tmp_path / "set" / "2.tar", name="x")) == 4


def test_a_sample_is_read_once_for_all_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [{"from": "human", "value": "<image>" * 3}, TALK[1]]
    members: dict[str, Any] = {}
    for key in range(2):
        members |= {f"{key}.{n}.png": png(3 * key + n) for n in range(3)} | {f"{key}.json": {"conversations": talk}}
    read, reads, pread = open_data(write_tar(tmp_path / "a.tar", members)), [], os.pread
    assert read is not None
    monkeypatch.setattr(os, "pread", lambda *place: reads.append(place) or pread(*place))
    for count, key in enumerate((0, 1, 0), 1):
        images = [np.array(load_image(part)) for part in read[key][0]["content"]]
        assert all(np.array_equal(images[n], image(3 * key + n)) for n in range(3))
        assert len(reads) == 2 * count  # the record and its members


def test_a_record_may_name_its_members_by_path_or_name(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": "b.png"}, {"type": "image", "image": "d/a.b.png"}]
    samples: dict[str, Any] = {
        "d/a.json": {"messages": [{"role": "user", "content": [parts[1]]}]},
        "d/a.b.png": png(1),
        "d/b.png": png(2),
        "d/b.json": {"conversations": TALK, "image": "d/b.png"},
        "c.png": png(3),
        "c.jpg": png(4),
        "c.json": {"messages": [{"role": "user", "content": "<image><image>"}], "images": ["c.jpg", "c.png"]},
        "d.png": png(5),
        "d.x.PNG": png(6),
        "d.json": {"messages": [{"role": "user", "content": "<image>1.png<image>"}]},
        "e.json": {"messages": [{"role": "user", "content": "q"}]},
        "f/1.png": png(7),
        "f/1.json": {"messages": [{"role": "user", "content": "<image>"}], "images": ["1.png"]},
    }
    read = open_data(write_tar(tmp_path / "a.tar", samples))
    assert read is not None
    found = []
    for conversation in read:
        content = conversation[0]["content"]
        images = [] if isinstance(content, str) else [part for part in content if part["type"] == "image"]
        found.append([np.array(load_image(part)) for part in images])
    expected = [[1], [2], [4, 3], [5, 6], [], [7]]
    assert [len(images) for images in found] == [len(seeds) for seeds in expected]
    for images, seeds in zip(found, expected, strict=True):
        assert all(np.array_equal(one, image(seed)) for one, seed in zip(images, seeds, strict=True))


def test_other_members_are_used_ignored_or_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.json": {"q": "Who?"}, "1.txt": b"A cat.", "1.png": png(1), "1.cls": b"7"})
    source = {"path": "a.tar", "form": "columns", "columns": {"user": "q", "assistant": "txt", "images": "images"}}
    meta = tmp_path / "meta.yaml"
    meta.write_text(json.dumps({"train": [{**source, "ignore": ["cls"]}]}))
    read = open_data(meta)
    assert read is not None
    assert [part.get("text") for part in read[0][0]["content"]] == [None, "Who?"]
    assert read[0][1]["content"] == "A cat."
    meta.write_text(json.dumps({"train": [source]}))
    with rejects("unknown key 'cls'", start=f"train data {tmp_path / 'a.tar'}, sample 1: "):
        (open_data(meta) or [])[0]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"1.png": b"", "1.txt": b"q"}, "expected one member that ends with .json, found 1.png, 1.txt"),
        ({"1.json": {"image": "1.png"}, "1.png": b"", "1.jpg": b""}, "a member '1.jpg' that its .json does not name"),
        ({"1.json": {"image": "1.11.png"}, "1.png": b"", "1.11.png": b""}, "a member '1.png' that its .json does not"),
        ({"1.json": {"txt": ""}, "1.txt": b"q"}, "a member '1.txt' and its .json the key 'txt'"),
        ({"1.json": b"{"}, "expected one JSON object"),
        ({"1.json": []}, "expected {"),
        ({"1.json": {}, "1.JSON": {}}, "expected one member that ends with .json, found 1.json, 1.JSON"),
        ({"1.json": {"q": ""}, "1.txt": b"caf\xe9"}, "member '1.txt': expected UTF-8 text"),
    ],
)
def test_a_sample_that_is_not_understood_is_rejected(tmp_path: Path, members: dict[str, Any], problem: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.json": {"messages": [{"role": "user", "content": "q"}]}, **members})
    read = open_data(path)
    assert read is not None
    assert read[0][0]["content"] == "q"
    with rejects(problem, start=f"train data {path}, sample 2: "):
        read[1]


def test_a_file_that_is_not_a_tar_file_of_samples_is_rejected(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.json": {}, "2.json": {}, "1.png": png(1)})
    with rejects("the members of the sample '1' are not adjacent", start=f"{path}: expected a tar file of samples"):
        Shards(path)
    write_tar(path, {"1.json": {}, "2.png": bytes(3000)})
    content = path.read_bytes()
    for damaged in (content[:2000], content[:700], b"{}", content[:1025], content[:1024], b""):
        path.write_bytes(damaged)
        with rejects(start=f"{path}: expected a tar file of samples: "):
            Shards(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.json"))
    with rejects(start=f"{path}: expected a tar file of samples: "):
        Shards(path)


def test_a_member_that_is_there_twice_is_rejected(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.json": {"conversations": TALK}, "1.png": png(1)})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = len(png(2))
        tar.addfile(info, io.BytesIO(png(2)))
    with rejects("expected each member once, found '1.png' twice", start=f"{path}, sample 1: "):
        Shards(path)[0]


def test_videos_are_members(tmp_path: Path) -> None:
    frames = moving(12)
    content = write_video(tmp_path / "a.mp4", frames, fps=4).read_bytes()
    talk = [{"from": "human", "value": "<video>Who?"}, TALK[1]]
    [conversation] = (
        open_data(write_tar(tmp_path / "a.tar", {"1.json": {"conversations": talk}, "1.mp4": content})) or []
    )
    processor = build_processor(["Who"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    video = conversation[0]["content"][0]
    expected = load_video({"type": "video", "video": tmp_path / "a.mp4"}, video_processor=processor.video_processor)
    found = load_video(video, video_processor=processor.video_processor)
    assert torch.equal(found.frames, expected.frames)
    assert found.metadata == expected.metadata
    assert media_shape(video, processor) == media_shape({"type": "video", "video": tmp_path / "a.mp4"}, processor)
    with rejects("video: 3 bytes cannot be decoded as a video"):
        load_video({**video, "video": b"abc"}, video_processor=processor.video_processor)
    with rejects("video: 3 bytes cannot be decoded as a video"):
        media_shape({**video, "video": b"abc"}, processor)


def test_labels_and_lists_of_folders_are_no_members(tmp_path: Path) -> None:
    """GNU tar writes them with -V and -g."""
    path = tmp_path / "a.tar"
    content = json.dumps({"messages": [{"role": "user", "content": "q"}]}).encode()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (("label", b"V"), ("dir", b"D"), ("1.json", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content) if name == "1.json" else 0
            tar.addfile(info, io.BytesIO(content))
    assert [one[0]["content"] for one in open_data(path) or []] == ["q"]


@pytest.mark.parametrize("extension", sorted(MEDIA))
def test_every_kind_of_image_and_video_is_one(extension: str) -> None:
    assert sample_record({"1.json": b"{}", f"1.{extension}": b""}) == {MEDIA[extension]: [f"1.{extension}"]}


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_links_are_rejected(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.json": {"conversations": TALK}})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = kind, "0.png"
        tar.addfile(info)
    with rejects("expected files, found a link or device '1.png'", start=f"{path}: "):
        Shards(path)


def test_what_comes_after_the_end_is_rejected(tmp_path: Path) -> None:
    """But for the zeros that fill the last record."""
    paths = [write_tar(tmp_path / f"{name}.tar", {f"{name}.json": {"conversations": TALK}}) for name in "ab"]
    joined = tmp_path / "c.tar"
    joined.write_bytes(paths[0].read_bytes() + paths[1].read_bytes())
    with rejects("expected nothing after the end of the archive", "`tar --concatenate`", start=f"{joined}: "):
        Shards(joined)
    joined.write_bytes(paths[0].read_bytes() + bytes(3 << 20))
    assert len(Shards(joined)) == 1


def test_names_that_are_not_utf_8_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\u00e9.json"))
    with rejects("expected names of members in UTF-8, found 'caf\\udce9.json'"):
        Shards(path)


@pytest.mark.parametrize("names", [("rötlich", "grün"), ('a "b"', "c"), ("日本", "語")], ids=["ö", "quotes", "日"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_names_of_members_may_have_any_letters(tmp_path: Path, names: tuple[str, str], ascii_only: bool) -> None:
    """JSON may write them as escapes: the order of the record stays, not that of the members."""
    first, second = (f"s.{name}.png" for name in names)
    record = {"messages": [{"role": "user", "content": "<image><image>"}], "images": [second, first]}
    text = json.dumps(record, ensure_ascii=ascii_only).encode()
    read = open_data(write_tar(tmp_path / "a.tar", {first: png(1), second: png(2), "s.json": text}))
    assert read is not None
    images = [np.array(load_image(part)) for part in read[0][0]["content"] if part["type"] == "image"]
    assert all(np.array_equal(one, image(seed)) for one, seed in zip(images, (2, 1), strict=True))


@pytest.mark.parametrize(
    ("record", "source"),
    [
        ({"file_name": "s.png", "messages": [{"role": "user", "content": "q"}]}, {"ignore": ["file_name"]}),
        ({"q": "Who?", "a": "s.png"}, {"form": "columns", "columns": {"user": "q", "assistant": "a"}}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "images/s.png"}]}]}, {}),
    ],
    ids=["ignored key", "answer", "text"],
)
def test_an_image_that_the_messages_do_not_use_is_rejected(
    tmp_path: Path, record: dict[str, Any], source: dict[str, Any]
) -> None:
    write_tar(tmp_path / "a.tar", {"s.png": png(1), "s.json": record})
    (tmp_path / "meta.yaml").write_text(json.dumps({"train": [{"path": "a.tar", **source}]}))
    with rejects("a member 's.png' that its messages do not use", start=f"train data {tmp_path / 'a.tar'}, sample 1: "):
        (open_data(tmp_path / "meta.yaml") or [])[0]
