"""The fingerprint of a table of lengths differs where lengths may, and is the same for a copy of the data."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen3VLProcessor

from megatron_vlbridge.data.conversations import read_conversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.lengths.fingerprint import fingerprint, table_path
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.sources.mixture import open_data
from megatron_vlbridge.demo.tiny_processor import build_processor

LINE = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "seven"}]}


def processor(*words: str, max_pixels: int = 1024) -> Qwen3VLProcessor:
    return build_processor(["hello", *words], patch_size=4, merge_size=2, min_pixels=64, max_pixels=max_pixels)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "a" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(f"{json.dumps(LINE)}\n" * 3)
    return file


def test_a_copy_of_the_data_has_the_same(path: Path) -> None:
    shutil.copytree(path.parent, path.parents[1] / "b")
    copies = [read_conversations(path.parents[1] / name / "train.jsonl") for name in "ab"]
    first, second = (fingerprint(one, Measure(processor(), 32)) for one in copies)
    assert first == second
    assert json.loads(json.dumps(first)) == first


def test_every_setting_that_changes_lengths_is_in_it(path: Path) -> None:
    base = Measure(processor(), 32)
    measures = {
        "image_processor": Measure(processor(max_pixels=2048), 32),
        "vision hidden size": replace(base, hidden_size=64),
        "media": replace(base, media=MediaOptions(max_pixels=500)),
        "labels": replace(base, labels=LabelOptions("last")),
        "tokenizer": Measure(processor("seven"), 32),
    }
    template = processor()
    template.chat_template += " "
    measures["chat_template"] = Measure(template, 32)
    expected = fingerprint(read_conversations(path), base)
    for name, measure in measures.items():
        found = fingerprint(read_conversations(path), measure)
        assert name in {key for key in expected if expected[key] != found[key]}, name


def test_data_form_and_tags_are_in_it(path: Path) -> None:
    base = Measure(processor(), 32)
    expected = fingerprint(read_conversations(path), base)
    assert fingerprint(read_conversations(path, literal_tags=True), base) != expected
    meta = path.with_name("meta.yaml")
    found = []
    for options in ("", ", form: openai", ", ignore: [id]"):
        meta.write_text(f"train: [{{path: train.jsonl{options}}}]")
        conversations = open_data(meta)
        assert conversations
        found.append(fingerprint(conversations, base))
    assert len({json.dumps(one) for one in found}) == 3
    # Another text of the same length, at the end of a large file and at its start.
    path.write_text("\n" * 2_500_000 + path.read_text())
    expected = fingerprint(read_conversations(path), base)
    path.write_text(path.read_text()[:-3] + "\n}\n")
    assert fingerprint(read_conversations(path), base)["sources"] != expected["sources"]
    path.write_text(path.read_text().strip().replace("\n}", "}") + "\n")
    expected = fingerprint(read_conversations(path), base)
    path.write_text(path.read_text().replace("seven", "eight"))
    assert fingerprint(read_conversations(path), base)["sources"] != expected["sources"]


def test_the_folder_of_media_is_in_it(path: Path) -> None:
    """Relative to the source, so that data may be moved."""
    for folder in ("images", "other"):
        path.with_name(folder).mkdir()
    found = {}
    for media in ("images", "./images", str(path.with_name("images")), "other", "."):
        path.with_name("meta.yaml").write_text(f"train: [{{path: train.jsonl, media: {media}}}]")
        conversations = open_data(path.with_name("meta.yaml"))
        assert conversations
        found[media] = fingerprint(conversations, Measure(processor(), 32))["sources"]
    same = [found["images"], found["./images"], found[str(path.with_name("images"))]]
    assert same[0] == same[1] == same[2]
    assert found["images"] != found["other"] != found["."] != found["images"]


def test_what_each_column_is_is_in_it(path: Path) -> None:
    table = path.with_name("train.csv")
    table.write_text("a,b,c\nx,y,\n")
    found = []
    for columns in (
        "user: a, assistant: b, image: c",
        "assistant: a, user: b, image: c",
        "user: a, assistant: b, video: c",
    ):
        path.with_name("meta.yaml").write_text(f"train: [{{path: train.csv, form: columns, columns: {{{columns}}}}}]")
        conversations = open_data(path.with_name("meta.yaml"))
        assert conversations
        found.append(json.dumps(fingerprint(conversations, Measure(processor(), 32))))
    assert len(set(found)) == 3


def test_only_shards_are_data_in_a_folder_of_shards(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "00.tar", "w") as shard:
        content = json.dumps(LINE).encode()
        member = tarfile.TarInfo("a.json")
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))
    found = []
    for _ in range(2):
        conversations = open_data(meta_of(folder))
        assert conversations
        found.append(fingerprint(conversations, Measure(processor(), 32)))
        (folder / "00.tar.index").touch()
        (folder / "README.md").touch()
    assert found[0] == found[1]
    assert [file["name"] for file in found[0]["sources"][0]["files"]] == ["00.tar"]


def meta_of(source: Path) -> Path:
    meta = source.with_name("meta.yaml")
    meta.write_text(f"train: [{{path: {source.name}}}]")
    return meta


def test_the_table_is_beside_the_data() -> None:
    assert table_path("data/meta.yaml", "valid") == Path("data/meta.yaml.valid.lengths")
