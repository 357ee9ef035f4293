"""`vlbridge data`: what it prints, writes and refuses, and that training reads the lengths that it wrote."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from megatron_vlbridge import cli, read_config
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.demo.start import write_checkpoint
from megatron_vlbridge.training.launch import data as data_arguments
from megatron_vlbridge.training.launch.data import open_conversations, open_lengths
from tests.errors import rejects
from tests.unit.time_limit import limit


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, seed=0)
    return folder


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """Twelve conversations to train on, with images of two sizes, and three without to validate."""
    for name, size in (("small", 32), ("wide", 64)):
        Image.fromarray(np.full((32, size, 3), 9, np.uint8)).save(tmp_path / f"{name}.png")
    for split, count in (("train", 12), ("valid", 3)):
        with (tmp_path / f"{split}.jsonl").open("w") as file:
            for index in range(count):
                image = [{"type": "image", "image": f"{('small', 'wide')[index % 2]}.png"}] * (split == "train")
                question: Any = [*image, {"type": "text", "text": "what " * (index % 3 + 1)}]
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": str(index)}]
                file.write(json.dumps({"messages": messages}) + "\n")
    path = tmp_path / "meta.yaml"
    path.write_text("train: [{path: train.jsonl}]\nvalid: [{path: valid.jsonl}]\n")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, words)])
    return code, *capsys.readouterr()


def add_broken(meta: Path) -> None:
    with meta.with_name("train.jsonl").open("a") as file:
        content = [{"type": "image", "image": "none.png"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
        file.write(json.dumps({"messages": messages}) + "\n")


def test_check_counts_and_writes_a_page(meta: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = meta.with_name("page.html")
    code, out, _ = run(capsys, "check", meta, "--hf-folder", hf, "--json", "--html", page, "--show", 2)
    found = json.loads(out)
    assert (code, found["failures"]) == (0, [])
    train, valid = found["splits"]["train"], found["splits"]["valid"]
    assert (train["conversations"], train["images"], valid["conversations"], valid["images"]) == (12, 12, 3, 0)
    assert train["supervised"] == train["supervised of roles"]["assistant"] > 0
    assert page.read_text().count("<h4>") == 4
    code, out, err = run(capsys, "check", meta, "--hf-folder", hf, "--html", page)
    assert out.splitlines()[-1] == f"page: {page}"
    assert err == "train: 12 of 12 conversations\nvalid: 3 of 3 conversations\n"
    code, out, _ = run(capsys, "check", meta, "--hf-folder", hf)
    assert code == 0
    assert out.startswith("train: 12 conversations, 0 failures, 12 images")


def test_check_lists_failures(meta: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_broken(meta)
    code, out, _ = run(capsys, "check", meta, "--hf-folder", hf)
    assert code == 1
    assert "train.jsonl, line 13: message 0 (user), part 0: image: no file" in out.splitlines()[-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_index_writes_what_training_reads(
    workers: int, meta: Path, hf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, "index", meta, "--hf-folder", hf, "--workers", workers)
    assert code == 0
    assert f"{meta}.train.lengths: 12 conversations" in out
    assert "valid: 3 of 3 conversations" in err
    args = Namespace(data=str(meta), conversations=None, valid_conversations=None, literal_tags=False)
    args.data_cache_path = None
    measure = Measure(AutoProcessor.from_pretrained(hf), read_config(hf).vision.hidden_size)
    conversations = open_conversations(args, "train")
    assert conversations
    table = open_lengths(args, "train", conversations, measure)
    assert table
    assert np.array_equal(table.rows, measure(conversations, range(12)).rows)
    assert len(set(table.rows["tokens"].tolist())) > 2
    # Other settings, then other data.
    other = Measure(measure.processor, measure.hidden_size, MediaOptions(max_pixels=2048))
    with rejects("media differ", "vlbridge data index"):
        open_lengths(args, "train", conversations, other)
    add_broken(meta)
    changed = open_conversations(args, "train")
    assert changed
    with rejects("conversations, sources differ"):
        open_lengths(args, "train", changed, measure)
    Path(f"{meta}.train.lengths").unlink()
    capsys.readouterr()
    for many, expected in ((14, ""), (13, f"13 conversations of train are measured now, as {meta}.train.lengths is")):
        monkeypatch.setattr(data_arguments, "MANY", many)
        assert open_lengths(args, "train", changed, measure) is None
        printed = capsys.readouterr().out
        assert expected in printed
        assert printed.endswith(f"vlbridge data index {meta}\n") if expected else not printed


def test_index_counts_failures(meta: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_broken(meta)
    code, out, _ = run(capsys, "index", meta, "--hf-folder", hf, "--json")
    assert code == 1
    train, _ = json.loads(out)
    assert (train["conversations"], train["failed"]) == (13, 1)
    assert "line 13:" in train["first_failed"]


def test_turns_that_are_not_learned_are_in_every_report(
    meta: Path, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with meta.with_name("train.jsonl").open("a") as file:
        messages = [{"role": ("user", "assistant")[index % 2], "content": "x"} for index in range(4)]
        file.write(json.dumps({"messages": messages}) + "\n")
    words = (meta, "--hf-folder", hf, "--label-turns", "last")
    report = "1 of 14 assistant turns are not learned, as they have"
    counts = {"assistant": 14, "excluded": 0, "skipped": 1, "first_excluded": ""}
    check, index, pack = (("check", *words), ("index", *words), ("pack", *words, "--seq-length", 64))
    for command in (check, index, pack):
        assert run(capsys, *command)[1].count(f"\n  {report}") == 1, command
    train = json.loads(run(capsys, *check, "--json")[1])["splits"]["train"]
    assert [train[f"{name} turns"] for name in ("assistant", "excluded", "skipped")] == [14, 0, 1]
    assert json.loads(run(capsys, *index, "--json")[1])[0]["turns"] == counts
    _, out, err = run(capsys, *pack, "--json")
    train = json.loads(out)["train"]
    assert (train["turns"], len(train["reports"]), train["dropped"], err) == (counts, 1, 0, "")


def test_a_failure_in_a_table_is_dated_until_it_is_written_again(
    meta: Path, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image of a table's failure was repaired; the conversation is left out until then."""
    add_broken(meta)
    assert run(capsys, "index", meta, "--hf-folder", hf)[0] == 1
    Image.new("RGB", (32, 32)).save(meta.with_name("none.png"))
    words = ("pack", meta, "--hf-folder", hf, "--seq-length", 64, "--json")
    code, out, _ = run(capsys, *words)
    assert code == 1
    assert f"no file '{meta.with_name('none.png')}' (found when {meta}.train.lengths was written; after a" in out
    train = json.loads(run(capsys, *words, "--max-bad-samples", 0.1)[1])["train"]
    assert (train["conversations"], train["failed"]) == (12, 1)
    [report] = train["reports"]
    assert report.startswith(
        f"1 of 13 conversations cannot be encoded (first: train data {meta.parent}/train.jsonl, line"
    )
    assert f"found when {meta}.train.lengths was written" in report
    assert run(capsys, "index", meta, "--hf-folder", hf)[0] == 0
    assert json.loads(run(capsys, *words)[1])["train"]["conversations"] == 13


def test_pack_reports_fill_and_patches(meta: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pack", meta, "--hf-folder", hf, "--seq-length", 64, "--data-parallel-size", 2)
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    measured = json.loads(out)
    assert run(capsys, "index", meta, "--hf-folder", hf)[0] == 0
    assert json.loads(run(capsys, *words, "--json")[1]) == measured
    train = measured["train"]
    assert train["conversations"] == 12
    assert train["fill"] == train["tokens"] / (64 * train["packs"])
    assert len(train["patches"]) == 2
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert out.startswith(f"train: {train['packs']} packs of 12 conversations")
    add_broken(meta)
    Path(f"{meta}.train.lengths").unlink()
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "line 13:" in err
    assert run(capsys, *words, "--max-bad-samples", 0.1)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_index_that_is_stopped_leaves_no_process(number: signal.Signals, tmp_path: Path, hf: Path) -> None:
    """Ctrl-C reaches all of its processes, the others the first one."""
    messages = [{"role": "user", "content": "what " * 50}, {"role": "assistant", "content": "seven"}]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps({'messages': messages})}\n" * 20_000)
    words = ["data", "index", str(path), "--hf-folder", str(hf), "--workers", "2"]
    # A process in the background ignores Ctrl-C, and its children inherit that.
    script = (
        "import signal, sys; from megatron_vlbridge.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main())"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, *words]
    with limit(), subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr
        assert process.stderr.readline().endswith(" of 20,000 conversations\n")
        if number is signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        try:
            # Ends when no process has the pipe any more.
            text = "".join(line for line in process.stderr if "conversations" not in line)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, text) == (
        (130, "vlbridge data: interrupted; what is finished is kept: run it again to go on\n")
        if number is signal.SIGINT
        else (-number, "")
    )


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["check", "--workers", "2"], 2, "--workers is an option of index, found with check"),
        (["index", "--html", "a.html"], 2, "--html is an option of check, found with index"),
        (["check", "--long-conversations", "drop"], 2, "--long-conversations is an option of pack, found with check"),
        (["index", "--pack-window", "9"], 2, "--pack-window is an option of pack, found with index"),
        (["pack", "--seed", "-1"], 2, "expected an integer from 0 to 999999999, found '-1'"),
        (["pack"], 2, "pack needs --seq-length"),
        (["pack", "--seq-length", "64", "--pack-window", "3"], 1, "--pack-window: needs --packing"),
        (["check", "--html", "none/page.html"], 1, "none/page.html: cannot write: expected a file in a folder"),
        (["check", "--html", "."], 1, "cannot write: expected a file in a folder that can be written, found a folder"),
        (["check", "--show", "3"], 2, "--show is an option of --html, found without it"),
        (
            ["pack", "--seq-length", "64", "--max-bad-samples", "-1"],
            1,
            "expected a share from 0 to below 1, found -1.0",
        ),
        (["chekc"], 2, "chekc"),
        (["check", "--htlm", "a"], 2, "Did you mean --html?"),
    ],
)
def test_wrong_usage_is_refused(
    words: list[str], code: int, text: str, meta: Path, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action, *options = words
    try:
        found = cli.main(["data", action, str(meta), "--hf-folder", str(hf), *options])
    except SystemExit as error:
        found = int(error.code or 0)
    assert found == code
    assert text in capsys.readouterr().err
