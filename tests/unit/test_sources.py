"""Sources of --data: read from YAML, everything in it used or rejected, and taken as often as their weights say."""

import argparse
import json
from collections import Counter
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlbridge.data.sources.meta import read_meta
from megatron_vlbridge.data.sources.mixture import Mixture, open_data
from megatron_vlbridge.data.sources.sampling import Share, check_shares, epoch_members
from megatron_vlbridge.training.launch.arguments import add_arguments
from megatron_vlbridge.training.launch.data import check_data_arguments, open_conversations
from megatron_vlbridge.training.launch.parser import make_parser
from tests.errors import rejects
from tests.unit.test_forms import COLUMNS, SAME

META = """
train:
  - path: one/messages.jsonl
    media: images
    weight: 0.5
  - {path: one/openai.jsonl, form: openai}
  - {path: tags.jsonl, form: tags, weight: 2}
  - {path: sharegpt.jsonl, ignore: [id]}
valid:
  - path: columns.jsonl
    form: columns
    columns: {user: q, assistant: a, image: file}
    weight: 2.25
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of each form, three lines in each."""
    for name in ("one", "images"):
        (tmp_path / name).mkdir()
    for form, record in SAME.items():
        lines = [json.dumps({**record, "id": 1} if form == "sharegpt" else record) + "\n"] * 3
        (tmp_path / ("one" if form in ("messages", "openai") else "") / f"{form}.jsonl").write_text("".join(lines))
    (tmp_path / "meta.yaml").write_text(META)
    return tmp_path


def test_the_sources_of_a_file_are_one_sequence(folder: Path) -> None:
    train, valid = (open_data(folder / "meta.yaml", split) for split in ("train", "valid"))
    assert isinstance(train, Mixture)
    assert isinstance(valid, Mixture)
    files = ["one/messages.jsonl", "one/openai.jsonl", "tags.jsonl", "sharegpt.jsonl"]
    assert [conversation.location for conversation in train] == [
        f"train data {folder / file}, line {line}" for file in files for line in (1, 2, 3)
    ]
    assert [one.location for one in train[-1:-14:-5]] == [train[index].location for index in (11, 6, 1)]
    images = [conversation[0]["content"][0]["image"] for conversation in train]
    where = [folder / "images", folder / "one", folder, folder]
    assert images == [str(path / "a.png") for path in where for _ in range(3)]
    assert train.shares == [Share(0, 3, Fraction(1, 2)), Share(3, 6, Fraction(1)), Share(6, 9, Fraction(2)),
                            Share(9, 12, Fraction(1))]  # fmt: skip
    assert [len(valid), valid[2].location] == [3, f"validation data {folder / 'columns.jsonl'}, line 3"]
    assert valid.shares == [Share(0, 3, Fraction(9, 4))]
    assert train[-5].location == train[7].location
    for index in (12, -13):
        with pytest.raises(IndexError):
            train[index]


def test_a_single_file_is_a_source_of_train(folder: Path) -> None:
    read = open_data(folder / "tags.jsonl")
    assert read is not None
    assert read.shares == [Share(0, 3, Fraction(1))]
    assert read[0][0]["content"][0]["image"] == str(folder / "a.png")
    assert open_data(folder / "tags.jsonl", "valid") is None
    with rejects(
        "the keys ['a', 'file', 'q'] are those of no form", start=f"train data {folder / 'columns.jsonl'}, line 1: "
    ):
        list(open_data(folder / "columns.jsonl") or [])


def source(**keys: Any) -> str:
    return json.dumps({"train": [{"path": "tags.jsonl", **keys}]})


REJECTED = {
    "empty": ("", "expected sources under 'train' and 'valid', found nothing"),
    "list": ("[]", "found list"),
    "no YAML": ("a: [", "expected YAML, found an error: while parsing"),
    "a tag of Python": ("train: !!python/object:os.system {}", "expected YAML, found an error"),
    "not UTF-8": ("train: \udcff", "expected YAML, found an error"),
    "unknown split": ("test: []", "unknown key 'test' (known: 'train', 'valid')"),
    "no sources": ("train: []", "train: expected a list of sources such as [{path: a.jsonl"),
    "a mapping": ("train: {path: tags.jsonl}", "train: expected a list of sources"),
    "split twice": ("train: []\ntrain: []", "key 'train' occurs twice in the mapping from line 1"),
    "key twice": ("train:\n- path: tags.jsonl\n  path: a", "key 'path' occurs twice in the mapping from line 2"),
    "source as text": ("train: [tags.jsonl]", "train, source 1: expected a mapping such as {path: "),
    "unknown key": (source(wieght=1), "train, source 1: unknown key 'wieght' (known: 'path', 'form', 'media', "),
    "number as key": ("train: [{path: tags.jsonl, 3: 4}]", "unknown key 3"),
    "no path": ("train: [{form: tags}]", "train, source 1: 'path' is missing"),
    "empty path": (source(path=""), "'path' is missing"),
    "path as number": (source(path=3), "expected 'path' to be a string, found int '3'"),
    "no file": (source(path="a.jsonl"), "train, source 1 (a.jsonl): no file "),
    "other file": (source(path="meta.yaml"), "a file that ends with .jsonl, .json, .csv, .tsv, .parquet, .tar"),
    "folder": (source(path="one"), "expected a folder saved by `datasets`, or with Parquet or tar files"),
    "form": (source(form="alpaca"), "train, source 1 (tags.jsonl): form: expected one of auto"),
    "form as list": (source(form=[]), "expected 'form' to be a string"),
    "columns of a form": (source(form="tags", columns=COLUMNS), "columns: expected the form columns"),
    "columns missing": (source(form="columns"), "columns: expected names of columns"),
    "media": (source(media="nowhere"), "'media' is not a folder: "),
    "media is a file": (source(media="tags.jsonl"), "'media' is not a folder: "),
    "ignore": (source(ignore="id"), "expected 'ignore' to be a list of keys, found str 'id'"),
    "ignore numbers": (source(ignore=[3]), "expected 'ignore' to be a list of keys"),
    **{f"weight {weight}": (source(weight=weight), "expected 'weight' to be a number above 0 and up to 100,000, found ")
       for weight in (0, -1, "1", True, None, [1], 1e30, 10**400)},
    "weight inf": ("train: [{path: tags.jsonl, weight: .inf}]", "expected 'weight' to be a number"),
    "weight nan": ("train: [{path: tags.jsonl, weight: .nan}]", "expected 'weight' to be a number"),
    "weight 1e-5": ("train: [{path: tags.jsonl, weight: 1e-5}]", "found str '1e-5'; write it as 0.00001"),
    "weight 1.5e4": ("train: [{path: tags.jsonl, weight: 1.5e4}]", "found str '1.5e4'; write it as 15000"),
    "weight 1e6": ("train: [{path: tags.jsonl, weight: 1e6}]", "up to 100,000, found str '1e6'"),
    "weight as a list": ("train: [{path: tags.jsonl, weight: !!int [1]}]", "expected a scalar node"),
    "weight octal": ("train:\n- {path: tags.jsonl, weight: 010}", "line 2: expected a decimal number, found 010"),
    "weight of minutes": ("train: [{path: tags.jsonl, weight: 1:30}]", "expected a decimal number, found 1:30"),
    "weight of seconds": ("train: [{path: tags.jsonl, weight: 1:30.5}]", "expected a decimal number, found 1:30.5"),
    "null byte": ('train: [{path: "a\\0.jsonl"}]', "expected a path, found an error: embedded null byte"),
    "lone surrogate": ('train: [{path: "\\ud800.jsonl"}]', "expected a path, found an error: "),
    "a long name": (source(path="a" * 300), "File name too long"),
    "a long name of media": (source(media="a" * 300), "File name too long"),
    "file twice": ("train: [{path: tags.jsonl}, {path: one/../tags.jsonl}]", "tags.jsonl is there twice; give"),
}  # fmt: skip


def path_kind(problem: str) -> bool:
    """Whether the error is that of a source, which is opened after the file of --data is read."""
    return "ends with" in problem or "saved by" in problem


@pytest.mark.parametrize(("text", "problem"), REJECTED.values(), ids=REJECTED.keys())
def test_a_file_with_an_error_is_rejected(folder: Path, text: str, problem: str) -> None:
    path = folder / "meta.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with rejects(problem, start="train data " if path_kind(problem) else f"{path}: "):
        open_data(path)


def test_a_weight_is_the_written_number(folder: Path) -> None:
    for text, weight in (
        ("0.3", Fraction(3, 10)),
        ("1_000", Fraction(1000)),
        ("1.1", Fraction(11, 10)),
        ("3", Fraction(3)),
    ):
        (folder / "meta.yaml").write_text(f"train: [{{path: tags.jsonl, weight: {text}}}]")
        assert read_meta(folder / "meta.yaml")["train"][0].weight == weight


def test_a_file_that_does_not_exist_is_rejected(tmp_path: Path) -> None:
    with rejects("cannot read the file (No such file", start=f"{tmp_path / 'a.yaml'}: "):
        read_meta(tmp_path / "a.yaml")
    with rejects(start=f"{tmp_path / 'a.jsonl'}: no such file"):
        read_meta(tmp_path / "a.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with rejects("expected at least one conversation, found none", start=f"train data {tmp_path}"):
        open_data(tmp_path / "empty.jsonl")


def parse(*words: Any) -> argparse.Namespace:
    args = make_parser(add_arguments).parse_args([str(word) for word in words])
    check_data_arguments(args)
    return args


def test_the_arguments_name_the_conversations_once(folder: Path) -> None:
    file = folder / "one" / "messages.jsonl"
    args = parse("--data", folder / "meta.yaml")
    assert [len(open_conversations(args, split) or []) for split in ("train", "valid")] == [12, 3]
    args = parse("--conversations", file)
    found = open_conversations(args, "train")
    assert found is not None
    assert found[1].location == f"train data {file}, line 2"
    assert open_conversations(args, "valid") is None
    found = open_conversations(parse("--valid-conversations", file), "valid")
    assert found is not None
    assert found[1].location == f"validation data {file}, line 2"
    for flag in ("--conversations", "--valid-conversations"):
        with rejects(f"and {flag}: expected one of them", start=f"--data {folder / 'meta.yaml'}"):
            parse("--data", folder / "meta.yaml", flag, file)
    (folder / "meta.yaml").write_text("valid: [{path: tags.jsonl}]")
    with rejects("expected sources under 'train', found valid"):
        parse("--data", folder / "meta.yaml")
    assert parse("--data", folder / "meta.yaml", "--skip-train").skip_train


def test_the_options_reach_every_source(folder: Path) -> None:
    (folder / "tags.jsonl").write_text('{"messages": [{"role": "user", "content": "<audio>"}]}\n')
    with rejects("'<audio>'"):
        list(open_conversations(parse("--data", folder / "tags.jsonl"), "train") or [])
    args = parse("--data", folder / "tags.jsonl", "--literal-tags")
    assert [one[0]["content"] for one in open_conversations(args, "train") or []] == ["<audio>"]


WEIGHTS = [Fraction(text) for text in ("1", "0.5", "2", "0.3", "2.25", "0.01", "1.999")]


def test_weights_with_which_an_epoch_may_be_empty_are_rejected() -> None:
    """And those with which it would not fit into memory; only the conversations that are kept count."""
    kept = np.arange(3, 10)
    check_shares(kept, [Share(0, 5, Fraction(1, 2)), Share(5, 9, Fraction(1, 100))])
    check_shares(kept, [Share(0, 10, Fraction(200_000_000, 7))])
    for shares, found in (
        ([Share(0, 4, Fraction(1, 2)), Share(5, 9, Fraction(1, 100))], "an epoch would take 0.5 conversations"),
        ([Share(0, 5, Fraction(2, 5)), Share(5, 9, Fraction(9, 100))], "an epoch would take 0.8 conversations"),
        ([Share(0, 3, Fraction(9))], "an epoch would take 0 conversations"),
        ([Share(0, 10, Fraction(200_000_001, 7))], "an epoch would take 200,000,001 conversations"),
        (
            [Share(3, 5, Fraction(50_000_001)), Share(5, 7, Fraction(50_000_000))],
            "would take 200,000,002 conversations",
        ),
    ):
        with rejects(found, start="weights: "):
            check_shares(kept, shares)


def test_each_epoch_takes_each_source_as_often_as_its_weight_says() -> None:
    """Counted: floor(w) times each, the rest once more, evenly over epochs, in no order of the file."""
    counts, kept = [10, 11, 5, 100, 7, 30, 13], np.setdiff1d(np.arange(176), [0, 12, 13, 60, 175])
    bounds = [0, *accumulate(counts)]
    shares = [Share(*edges, weight) for edges, weight in zip(pairwise(bounds), WEIGHTS, strict=True)]
    total: Counter[int] = Counter()
    for epoch in range(101):
        members = epoch_members(kept, shares, seed=3, epoch=epoch)
        assert np.array_equal(members, epoch_members(kept, shares, seed=3, epoch=epoch))
        taken = Counter(members.tolist())
        total += taken
        assert taken.keys() <= set(kept.tolist())
        for begin, end, weight in shares:
            own = [taken[member] for member in kept[(kept >= begin) & (kept < end)].tolist()]
            assert all(weight // 1 <= times <= weight // 1 + 1 for times in own)
            assert abs(sum(own) - weight * len(own)) < 1
            so_far = [total[member] for member in kept[(kept >= begin) & (kept < end)].tolist()]
            assert max(so_far) - min(so_far) <= 1
            assert sum(so_far) == weight * len(own) * (epoch + 1) // 1
    half, others = (
        [member for member in epoch_members(kept, shares, seed=seed, epoch=0).tolist() if 10 <= member < 21]
        for seed in (3, 4)
    )
    assert half != sorted(half)
    assert set(half) != set(others), "another seed, another half"
    assert len(epoch_members(kept[:0], shares, seed=3, epoch=0)) == 0


def test_sources_of_the_same_size_take_other_shares() -> None:
    shares = [Share(0, 100, Fraction(1, 2)), Share(100, 200, Fraction(1, 2))]
    members = epoch_members(np.arange(200), shares, seed=0, epoch=0)
    assert set(members[:50].tolist()) != set((members[50:] - 100).tolist())
