"""Interrupted runs: what is finished is continued to the same bytes, and never under changed conditions."""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_vlbridge import cli, families, locks
from megatron_vlbridge.checkpoint import conversion, import_plan
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.formats import TRACKER
from megatron_vlbridge.checkpoint.hf import writer as hf_writer
from megatron_vlbridge.checkpoint.hf.header import encode_header
from megatron_vlbridge.checkpoint.hf.reader import INDEX
from megatron_vlbridge.checkpoint.import_plan import plan_import
from megatron_vlbridge.checkpoint.stream import engine
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.stream.digest import digest_range
from megatron_vlbridge.checkpoint.stream.engine import Options, Progress
from megatron_vlbridge.checkpoint.stream.parts import Part
from megatron_vlbridge.checkpoint.torch_dist import writer as torch_dist_writer
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.families import qwen3_vl
from megatron_vlbridge.weights import TensorSpec
from tests import reference
from tests.unit import test_convert, test_convert_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("model") / "hf", layers=2)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    """Tens of parts for a tiny checkpoint."""
    monkeypatch.setattr(hf_writer, "PART_BYTES", 20_000)
    monkeypatch.setattr(torch_dist_writer, "PART_BYTES", 20_000)


@pytest.fixture
def source(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "hf"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stop_after(parts: int) -> Options:
    """Options under which the user interrupts after so many parts."""
    seen = []

    def report(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == parts:
            raise KeyboardInterrupt

    return Options(workers=2, report=report)


def interrupt(source: Path, target: Path, parts: int = 5, *, left: bool = False, **arguments) -> Path:
    """An import that is interrupted; gives its work folder. Whether a target was `left` that was there before."""
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(source, target, options=stop_after(parts), **arguments)
    assert target.exists() == left
    return target.parent / f".{target.name}.vlbridge"


def test_a_resumed_import_gives_the_same_bytes_and_repeats_nothing(source, tmp_path):
    expected = files_of(import_checkpoint(source, tmp_path / "straight"))
    work = interrupt(source, tmp_path / "megatron")
    interrupt(source, tmp_path / "megatron", 9, resume=True)
    finished = len((work / "journal.jsonl").read_text().splitlines()) - 1
    seen: list[Progress] = []
    import_checkpoint(source, tmp_path / "megatron", options=Options(report=seen.append), resume=True)
    assert files_of(tmp_path / "megatron") == expected
    assert names_of(tmp_path) == {"hf", "straight", "megatron"}
    assert len(seen) > finished >= 9
    assert seen[-1].resumed >= finished / len(seen) * seen[-1].total / 2
    assert seen[-1].done == seen[-1].total


def test_a_resumed_export_gives_the_same_bytes(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    expected = files_of(export_checkpoint(tmp_path / "megatron", tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=stop_after(6))
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", resume=True)
    assert files_of(tmp_path / "back") == expected


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_number_of_workers_does_not_change_the_bytes(workers, source, tmp_path):
    expected = files_of(import_checkpoint(source, tmp_path / "megatron", options=Options(workers=3)))
    assert files_of(import_checkpoint(source, tmp_path / "other", options=Options(workers=workers))) == expected


def test_an_interrupted_run_is_not_continued_unasked(source, tmp_path):
    work = interrupt(source, tmp_path / "megatron")
    with pytest.raises(VLBridgeError, match=r"found \d+ finished parts.*--resume") as caught:
        import_checkpoint(source, tmp_path / "megatron")
    assert str(work) in str(caught.value)
    assert not (tmp_path / "megatron").exists()


def test_an_interruption_before_the_first_part_leaves_nothing(source, tmp_path):
    def report(_progress: Progress) -> None:
        raise AssertionError

    with pytest.raises(UsageError, match="memory: expected at least"):
        import_checkpoint(source, tmp_path / "megatron", options=Options(memory=1000, report=report))
    assert names_of(tmp_path) == {"hf"}


def change_weights(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": 1}))


def change_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("change", [change_weights, change_config, change_tokenizer])
def test_a_source_that_has_changed_is_refused(change, source, tmp_path):
    interrupt(source, tmp_path / "megatron")
    change(source)
    with pytest.raises(VLBridgeError, match="expected to continue from the same source"):
        import_checkpoint(source, tmp_path / "megatron", resume=True)
    assert not (tmp_path / "megatron").exists()


def test_an_option_that_has_changed_is_named(tmp_path):
    moe = test_convert_moe.make(tmp_path / "hf", "per_expert")
    interrupt(moe, tmp_path / "megatron")
    changed = {
        "--dtype 'bfloat16' where it was nothing": {"dtype": "bfloat16"},
        "--experts 'per_expert' where it was nothing": {"experts": "per_expert"},
    }
    for text, options in changed.items():
        with pytest.raises(VLBridgeError, match=f"with the same options, found {text}"):
            import_checkpoint(moe, tmp_path / "megatron", **options, resume=True)


def swap_norms(monkeypatch) -> None:
    """Rules of another version, under which two tensors of one shape change places."""

    def rules(*arguments):
        return [swapped(rule) if "_norm." in getattr(rule, "hf", "") else rule for rule in own(*arguments)]

    def swapped(rule):
        names = {"q_norm": "k_norm", "k_norm": "q_norm"}
        return replace(rule, hf=re.sub("[qk]_norm", lambda match: names[match[0]], rule.hf))

    own = qwen3_vl.FAMILY.rules
    monkeypatch.setattr(families, "FAMILIES", (replace(qwen3_vl.FAMILY, rules=rules),))


CODE = {
    "rules": swap_norms,
    "torch": lambda monkeypatch: monkeypatch.setattr(torch, "__version__", "99.0"),
    "version": lambda monkeypatch: monkeypatch.setattr(conversion, "_VERSION", 99),
}


@pytest.mark.parametrize("what", CODE)
def test_other_code_does_not_continue(what, source, tmp_path, monkeypatch):
    interrupt(source, tmp_path / "megatron")
    CODE[what](monkeypatch)
    with pytest.raises(VLBridgeError, match=f"with the same options, found {what} "):
        import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_dtypes_of_another_version_do_not_continue(tmp_path, monkeypatch):
    """One that stores all 16-bit weights as float32: options, source and rules are the same."""

    def upcast(*arguments):
        specs, _ = megatron_tensors(*arguments)
        return {name: TensorSpec(spec.shape, torch.float32) for name, spec in specs.items()}, frozenset(specs)

    source = test_convert.make(tmp_path / "hf")
    interrupt(source, tmp_path / "megatron")
    megatron_tensors = import_plan.megatron_tensors
    monkeypatch.setattr(import_plan, "megatron_tensors", upcast)
    with pytest.raises(VLBridgeError, match="with the same options, found tensors "):
        import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_a_change_behind_the_first_bytes_is_refused_though_the_times_are_set_back(source, tmp_path):
    path = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    before = path.stat()
    assert before.st_size > 2**16 + 1
    interrupt(source, tmp_path / "megatron")
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(VLBridgeError, match=rf"{path.name}.*changed \(content, rights or links\).*begin again"):
        import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_a_source_behind_links_is_continued_and_refused_when_they_lead_elsewhere(model, tmp_path):
    """As the Hub's cache keeps files."""
    folder, blobs = tmp_path / "hf", [shutil.copytree(model, tmp_path / name) for name in ("blobs", "others")]

    def link(place: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in place.iterdir():
            (folder / path.name).symlink_to(path)

    link(blobs[0])
    expected = files_of(import_checkpoint(folder, tmp_path / "straight"))
    interrupt(folder, tmp_path / "megatron")
    link(blobs[1])
    with pytest.raises(VLBridgeError, match="expected to continue from the same source"):
        import_checkpoint(folder, tmp_path / "megatron", resume=True)
    link(blobs[0])
    assert files_of(import_checkpoint(folder, tmp_path / "megatron", resume=True)) == expected


def renamed(folder: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """The same checkpoint in files of other names, in the same order."""
    index = json.loads((folder / INDEX).read_text())
    weight_map = {name: rename(file) for name, file in index["weight_map"].items()}
    shutil.copytree(folder, target)
    for file in set(index["weight_map"].values()):
        (target / file).rename(target / rename(file))
    (target / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
    return target


def swap_two(folder: Path, target: Path) -> Path:
    """The same checkpoint and file names, but two tensors of one shape and file in the other order."""
    shutil.copytree(folder, target)
    for path in sorted(target.glob("*.safetensors")):
        tensors = load_file(path)
        shapes = {(tensor.shape, tensor.dtype): name for name, tensor in tensors.items()}
        pairs = [(name, shapes[tensor.shape, tensor.dtype]) for name, tensor in tensors.items()]
        for one, other in (pair for pair in pairs if pair[0] != pair[1]):
            path.write_bytes(reordered(path.read_bytes(), one, other))
            return target
    raise AssertionError


def reordered(content: bytes, one: str, other: str) -> bytes:
    """A file in which two entries of the header, and their numbers, have changed places."""
    length = int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    places = [slice(*header[name]["data_offsets"]) for name in (one, other)]
    numbers[places[0]], numbers[places[1]] = numbers[places[1]], numbers[places[0]]
    header[one], header[other] = header[other], header[one]
    return content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + bytes(numbers)


SIZES = {"larger shards": 10**9, "smaller shards": 50_000}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_other_shard_sizes_are_refused(turned, size, source, tmp_path):
    """They once were not: the finished parts of the other files were kept, and left zeros in these."""
    import_checkpoint(source, tmp_path / "megatron")
    before, now = (size, None) if turned else (None, size)
    interrupt_export(tmp_path, max_shard_size=before)
    with pytest.raises(VLBridgeError, match=rf"found --max-shard-size {now or 'nothing'} where it was") as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", max_shard_size=now, resume=True)
    assert re.search("Give.*or remove", str(caught.value))
    assert not (tmp_path / "back").exists()


def interrupt_export(folder: Path, **options) -> None:
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(folder / "megatron", folder / "back", options=stop_after(6), **options)


FILES = {
    "other names": lambda source, path: renamed(source, path, lambda file: f"part-{file}"),
    "other order": swap_two,
}


@pytest.mark.parametrize("other", FILES)
@pytest.mark.parametrize("turned", [False, True])
def test_other_files_are_refused(turned, other, source, tmp_path):
    """A folder that was put in the place of the one that `like` named, with all times and texts as they were."""
    import_checkpoint(source, tmp_path / "megatron")
    places = [source, FILES[other](source, tmp_path / "other")]
    before, now = reversed(places) if turned else places
    like = tmp_path / "like"
    before.rename(like)
    expected = files_of(export_checkpoint(tmp_path / "megatron", tmp_path / "straight", like=like))
    interrupt_export(tmp_path, like=like)
    like.rename(before)
    now.rename(like)
    with pytest.raises(VLBridgeError, match=r"with the same options, found files\..*Give.*or remove"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", resume=True, like=like)
    assert not (tmp_path / "back").exists()
    like.rename(now)
    before.rename(like)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", resume=True, like=like)
    assert files_of(tmp_path / "back") == expected


MOVED = {
    "another file": lambda part: {"file": f"../stale/{part['file']}"},
    "another start": lambda part: {"start": part["start"] + 8},
}


@pytest.mark.parametrize("change", MOVED.values(), ids=MOVED)
def test_a_part_that_lies_elsewhere_is_written_again(change, source, tmp_path):
    """A journal that is intact by its checksums, but not of this writer."""
    import_checkpoint(source, tmp_path / "megatron")
    expected = files_of(export_checkpoint(tmp_path / "megatron", tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=stop_after(6))
    work = tmp_path / ".back.vlbridge"
    first, *parts = (work / "journal.jsonl").read_text().splitlines()
    moved = []
    shutil.copytree(work / "result", work / "stale")
    for part in map(json.loads, parts):  # what was kept is lost where it belongs
        with (work / "result" / part["file"]).open("r+b") as stream:
            stream.seek(part["start"])
            stream.write(bytes(part["length"]))
        moved.append(part | change(part))
    for part in moved:
        part["blake3"] = digest_range(work / "result" / part["file"], part["start"], part["length"]).value
    (work / "journal.jsonl").write_text("\n".join([first, *map(json.dumps, moved)]) + "\n")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", resume=True)
    assert files_of(tmp_path / "back") == expected


def test_a_finished_part_that_rots_is_written_again(source, tmp_path):
    expected = files_of(import_checkpoint(source, tmp_path / "straight"))
    work = interrupt(source, tmp_path / "megatron")
    part = json.loads((work / "journal.jsonl").read_text().splitlines()[2])
    path = work / "result" / part["file"]
    path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    import_checkpoint(source, tmp_path / "megatron", resume=True)
    assert files_of(tmp_path / "megatron") == expected


@pytest.mark.parametrize("torn", ["", '{"number": 3', "\0\0\0\0", "[1]\n", "{}\n"])
def test_a_torn_journal_is_read_up_to_the_tear(torn, source, tmp_path):
    expected = files_of(import_checkpoint(source, tmp_path / "straight"))
    work = interrupt(source, tmp_path / "megatron")
    with (work / "journal.jsonl").open("a") as stream:
        stream.write(torn)
    seen: list[Progress] = []
    import_checkpoint(source, tmp_path / "megatron", options=Options(report=seen.append), resume=True)
    assert seen[-1].resumed > 0
    assert files_of(tmp_path / "megatron") == expected


def test_an_interruption_while_the_journal_is_begun_anew_loses_no_part(source, tmp_path, monkeypatch):
    work = interrupt(source, tmp_path / "megatron")
    before = (work / "journal.jsonl").read_text()
    write_text = Path.write_text

    def torn(path, text, **options):
        write_text(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", torn)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint(source, tmp_path / "megatron", resume=True)
    assert (work / "journal.jsonl").read_text() == before


def test_two_runs_into_one_target_exclude_each_other(source, tmp_path):
    refused: list[str] = []

    def report(_progress: Progress) -> None:
        if not refused:
            with pytest.raises(VLBridgeError, match="another run that writes it") as caught:
                import_checkpoint(source, tmp_path / "megatron", resume=True)
            refused.append(str(caught.value))

    import_checkpoint(source, tmp_path / "megatron", options=Options(report=report))
    assert len(refused) == 1
    assert names_of(tmp_path) == {"hf", "megatron"}


def test_a_lock_that_went_away_between_opening_and_locking_is_taken_anew(source, tmp_path, monkeypatch):
    """As when the run that held it ends just then and removes its folder."""
    flock, calls = fcntl.flock, []

    def late(handle, operation):
        calls.append(handle)
        if len(calls) == 1:
            shutil.rmtree(tmp_path / ".megatron.vlbridge")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    import_checkpoint(source, tmp_path / "megatron")
    assert len(calls) == 2
    assert names_of(tmp_path) == {"hf", "megatron"}


def test_a_run_that_waits_for_nobody_after_another_was_killed(source, tmp_path):
    """The lock goes with the process: a lock file that is left over keeps nobody out."""
    work = interrupt(source, tmp_path / "megatron")
    assert (work / "lock").exists()
    import_checkpoint(source, tmp_path / "megatron", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_left_after_the_rename_is_swept(resume, source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    work = tmp_path / ".megatron.vlbridge"
    work.mkdir()
    (work / "lock").touch()
    if resume:
        import_checkpoint(source, tmp_path / "megatron", resume=True)
    else:
        with pytest.raises(VLBridgeError, match="expected a name that is free"):
            import_checkpoint(source, tmp_path / "megatron")
    assert names_of(tmp_path) == {"hf", "megatron"}


def test_a_result_that_is_complete_is_left_as_it_is(source, tmp_path, capsys):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    for line in (["import", source, megatron, "--dtype", "bf16"], ["export", megatron, back, "--like", source]):
        line = [*map(str, line), "--resume"]
        assert cli.main(line) == 0
        before = tree(tmp_path)
        capsys.readouterr()
        assert cli.main(line) == 0
        assert "is complete: nothing to do" in capsys.readouterr().err
        assert cli.main([*line, "--dry-run"]) == 0
        assert tree(tmp_path) == before
        with pytest.raises(VLBridgeError, match="expected a name that is free"):
            import_checkpoint(source, Path(line[2]))  # without resume it is refused as ever


def test_a_run_that_saved_beside_an_import_leaves_it_complete(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    (tmp_path / "megatron" / "iter_0000007").mkdir()
    (tmp_path / "megatron" / TRACKER).write_text("7")
    import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_a_result_stays_complete_when_parts_or_torch_change(source, tmp_path, monkeypatch):
    import_checkpoint(source, tmp_path / "megatron")
    monkeypatch.setattr(torch_dist_writer, "PART_BYTES", 10_000)
    monkeypatch.setattr(torch, "__version__", "99.0")
    import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_the_result_of_another_conversion_is_not_taken_for_this_one(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron", dtype="float16")
    options = {"dtype": "bfloat16", "resume": True}
    with pytest.raises(VLBridgeError, match="found that of another: --dtype 'bfloat16' where it was 'float16'"):
        import_checkpoint(source, tmp_path / "megatron", **options)
    plan = plan_import(source, tmp_path / "megatron", dtype="bfloat16")
    with pytest.raises(VLBridgeError, match="found that of another"):
        plan.check_run(resume=True)
    change_weights(source)
    with pytest.raises(VLBridgeError, match="found that of another: weights"):
        import_checkpoint(source, tmp_path / "megatron", dtype="float16", resume=True)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: os.truncate(path, 5), "5"),
        (lambda path: os.truncate(path, 0), "0"),
    ],
)
def test_a_result_that_has_lost_something_is_not_complete(damage, found, source, tmp_path):
    path = next(import_checkpoint(source, tmp_path / "megatron").rglob("*.distcp"))
    damage(path)
    with pytest.raises(VLBridgeError, match=rf"{path.name}: expected \d+ bytes.* found {found}\..*convert again"):
        import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_what_is_no_result_is_not_complete(source, tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "mine").touch()
    with pytest.raises(VLBridgeError, match="expected a name that is free"):
        import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_an_empty_folder_is_a_target(source, tmp_path, monkeypatch):
    for name in ("megatron", "back", "straight"):
        (tmp_path / name).mkdir()
    assert cli.main(["import", str(source), str(tmp_path / "megatron"), "--dry-run"]) == 0
    work = interrupt(source, tmp_path / "megatron", left=True)
    assert names_of(tmp_path / "megatron") == set()
    assert (work / "result").is_dir()
    import_checkpoint(source, tmp_path / "megatron", resume=True)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "megatron") == files_of(import_checkpoint(source, tmp_path / "straight"))
    assert names_of(tmp_path) == {"hf", "megatron", "back", "straight"}


def test_an_empty_folder_that_is_filled_meanwhile_is_left_alone(source, tmp_path):
    def report(_progress: Progress) -> None:
        (tmp_path / "megatron" / "mine").touch()

    (tmp_path / "megatron").mkdir()
    with pytest.raises(VLBridgeError, match="expected a name that is free"):
        import_checkpoint(source, tmp_path / "megatron", options=Options(report=report))
    assert names_of(tmp_path / "megatron") == {"mine"}


def test_a_run_that_begins_in_an_empty_folder_does_not_sweep_another_one_away(source, tmp_path):
    """The other has the lock but no result yet."""
    (tmp_path / "megatron").mkdir()
    work = tmp_path / ".megatron.vlbridge"
    with locks.locked(tmp_path / "megatron", work):
        with pytest.raises(VLBridgeError, match="another run that writes it"):
            import_checkpoint(source, tmp_path / "megatron", resume=True)
        assert (work / "lock").exists()


@pytest.mark.parametrize("name", [".", "link", "megatron/.."])
def test_other_empty_folders_are_no_target(name, source, tmp_path, monkeypatch):
    """The working folder itself, and a link, which a rename would not follow."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "megatron")
    monkeypatch.chdir(tmp_path / "megatron" if name == "." else tmp_path)
    with pytest.raises(VLBridgeError, match="expected a name that is free"):
        import_checkpoint(source, name)


def test_a_journal_without_its_result_is_no_hindrance(source, tmp_path):
    """Killed between the rename and the tidying, and the result removed since."""
    expected = files_of(import_checkpoint(source, tmp_path / "straight"))
    work = interrupt(source, tmp_path / "megatron")
    shutil.rmtree(work / "result")
    import_checkpoint(source, tmp_path / "megatron", resume=True)
    assert files_of(tmp_path / "megatron") == expected


def test_a_disk_that_is_too_small_is_found_before_the_first_byte(source, tmp_path, capsys):
    """A terabyte of embeddings in a file without blocks on the disk."""
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = True
    rows = config["text_config"]["vocab_size"] = 2**32
    (source / "config.json").write_text(json.dumps(config))
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        path.unlink()
    (source / INDEX).unlink()
    del tensors["lm_head.weight"]
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    specs["model.language_model.embed_tokens.weight"] = TensorSpec((rows, 64), torch.float32)
    header = encode_header(specs)
    with (source / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
    assert cli.main(["import", str(source), str(tmp_path / "megatron"), "--dry-run"]) == 1
    assert re.search(r"expected \d{13} bytes of free space, found", capsys.readouterr().err)
    begun = threading.Event()
    with pytest.raises(VLBridgeError, match=r"expected \d{13} bytes of free space, found"):
        import_checkpoint(source, tmp_path / "megatron", options=Options(report=lambda _progress: begun.set()))
    assert not begun.is_set()
    assert names_of(tmp_path) == {"hf"}


def test_space_is_needed_only_for_what_is_still_to_be_written(source, tmp_path, monkeypatch):
    target = tmp_path / "megatron"
    plan = plan_import(source, target)
    side = sum(
        path.stat().st_size for path in source.iterdir() if path.name in ("config.json", "generation_config.json")
    )
    needed = plan.nbytes + side + conversion._SPARE_BYTES
    interrupt(source, target)
    monkeypatch.setattr(conversion, "free_bytes", lambda _target: needed - 1)
    with pytest.raises(VLBridgeError, match=f"expected {needed} bytes of free space, found {needed - 1}"):
        plan_import(source, tmp_path / "other").check_run()
    import_checkpoint(source, target, resume=True)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def taken(_source: Path, target: Path) -> list[str]:
    target.mkdir()
    (target / "mine").touch()
    return []


def taken_after_a_kill(_source: Path, target: Path) -> list[str]:
    work = target.parent / f".{target.name}.vlbridge"
    for folder in (target, work):
        folder.mkdir()
    (target / "mine").touch()
    (work / "lock").touch()
    return []


def begun(source: Path, target: Path) -> list[str]:
    interrupt(source, target)
    return []


def begun_from_another_source(source: Path, target: Path) -> list[str]:
    interrupt(source, target)
    change_config(source)
    return ["--resume"]


def below_a_file(_source: Path, target: Path) -> list[str]:
    target.parent.write_text("")
    return []


def short_of_memory(_source: Path, _target: Path) -> list[str]:
    return ["--memory", "1MB"]


UNFIT = {
    taken: "expected a name that is free",
    taken_after_a_kill: "expected a name that is free",
    begun: "finished parts of an interrupted run",
    begun_from_another_source: "expected to continue from the same source",
    below_a_file: "expected a folder with write permission",
    short_of_memory: "memory: expected at least",
}


@pytest.mark.parametrize("make", UNFIT)
def test_a_dry_run_refuses_what_a_run_would_and_writes_nothing(make, source, tmp_path, capsys):
    target = tmp_path / "below" / "megatron"
    if make is not below_a_file:
        target.parent.mkdir()
    more = make(source, target)
    before = tree(tmp_path)
    code = 2 if make is short_of_memory else 1
    assert cli.main(["import", str(source), str(target), "--dry-run", *more]) == code
    assert UNFIT[make] in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert cli.main(["import", str(source), str(target), *more]) == code


def test_a_dry_run_of_a_resume_succeeds_and_the_work_is_still_there(source, tmp_path, capsys):
    work = interrupt(source, tmp_path / "megatron")
    before = tree(work)
    assert cli.main(["import", str(source), str(tmp_path / "megatron"), "--dry-run", "--resume"]) == 0
    assert "GB to write in" in capsys.readouterr().out
    assert tree(work) == before
    import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_a_dry_run_beside_a_run_says_so(source, tmp_path, capsys):
    codes: list[int] = []

    def report(_progress: Progress) -> None:
        if not codes:
            codes.append(cli.main(["import", str(source), str(tmp_path / "megatron"), "--dry-run", "--resume"]))

    import_checkpoint(source, tmp_path / "megatron", options=Options(report=report))
    assert codes == [1]
    assert "another run that writes it" in capsys.readouterr().err


def fills_after(parts: int) -> Options:
    """Options under which the disk, as far as this process sees it, is full after so many parts."""
    seen = []

    def report(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == parts:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return Options(workers=1, report=report)


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_a_disk_that_fills_after_some_parts_is_continued_to_the_same_bytes(convert, source, tmp_path):
    if convert is export_checkpoint:
        source = import_checkpoint(source, tmp_path / "source")
    seen: list[Progress] = []
    expected = files_of(convert(source, tmp_path / "straight", options=Options(report=seen.append)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(VLBridgeError, match=r"File too large.*\d+ finished parts are kept.*--resume"):
            convert(source, tmp_path / "target", options=fills_after(8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "target").exists()
    kept = len((tmp_path / ".target.vlbridge" / "journal.jsonl").read_text().splitlines()) - 1
    assert 8 <= kept < len(seen)
    convert(source, tmp_path / "target", options=Options(report=seen.append), resume=True)
    assert seen[-1].resumed > 0
    assert files_of(tmp_path / "target") == expected


@pytest.mark.parametrize("number", [0, 3, 24, 48])
def test_the_error_of_any_write_is_the_one_that_is_reported(number, source, tmp_path, monkeypatch):
    """torch.save goes on after a failed write, and fails for another reason."""
    numbers, write = itertools.count(), torch_dist_writer._HashedFile.write

    def fail_once(file, data):
        if next(numbers) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(torch_dist_writer._HashedFile, "write", fail_once)
    with pytest.raises(VLBridgeError, match="No space left on device"):
        import_checkpoint(source, tmp_path / "target", options=Options(workers=1))


def test_the_cause_of_a_failure_is_raised_where_an_earlier_part_was_stopped_by_it():
    futures: list[Future[Part]] = [Future(), Future()]
    futures[0].set_exception(engine._StoppedError())
    futures[1].set_exception(OSError("the disk is full"))
    with pytest.raises(OSError, match="the disk is full"):
        engine._results(futures)


def test_a_source_that_ends_early_while_it_is_read_is_named_and_the_work_kept(source, tmp_path):
    index = json.loads((source / INDEX).read_text())
    shard = source / index["weight_map"]["model.visual.deepstack_merger_list.1.linear_fc2.bias"]  # written last

    def report(_progress: Progress) -> None:
        with shard.open("r+b") as stream:
            stream.truncate(8)

    with pytest.raises(VLBridgeError, match=rf"{shard.name}: expected to read .*too early.*finished parts are kept"):
        import_checkpoint(source, tmp_path / "megatron", options=Options(workers=1, report=report))
    assert not (tmp_path / "megatron").exists()


def with_sha256(part: dict[str, Any], result: Path) -> dict[str, Any]:
    """A line of the journal as earlier versions wrote it."""
    content = (result / part["file"]).read_bytes()[part["start"] : part["start"] + part["length"]]
    keys = ("number", "file", "start", "length")
    return {key: part[key] for key in keys} | {"sha256": hashlib.sha256(content).hexdigest(), "places": part["places"]}


def test_work_of_an_earlier_version_is_continued_and_its_result_recognised(source, tmp_path):
    """It called the option `--leave-out`, and its checksums were SHA-256."""
    test_convert.rewrite(source, lambda found: found.update({"rotary.x": torch.zeros(3)}))
    options = {"ignore": ["rotary.*"]}
    expected = files_of(import_checkpoint(source, tmp_path / "straight", **options))
    work = interrupt(source, tmp_path / "megatron", **options)
    rename = lambda text: text.replace('"--ignore"', '"--leave-out"')  # noqa: E731
    journal, manifest = work / "journal.jsonl", tmp_path / "straight" / CHECKSUMS
    for path in (journal, manifest):
        assert '"--ignore"' in path.read_text()
        path.write_text(rename(path.read_text()))
    origin, *parts = journal.read_text().splitlines()
    old = [with_sha256(json.loads(part), work / "result") for part in parts]
    journal.write_text("\n".join([origin, *map(json.dumps, old)]) + "\n")
    damaged = work / "result" / old[-1]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    seen: list[Progress] = []
    import_checkpoint(source, tmp_path / "megatron", resume=True, options=Options(report=seen.append), **options)
    assert seen[-1].resumed > 0
    assert files_of(tmp_path / "megatron") == expected
    import_checkpoint(source, tmp_path / "straight", resume=True, **options)
    with pytest.raises(VLBridgeError, match=r"found that of another: --ignore \['rotary\.x'\] where it was \['rotary"):
        import_checkpoint(source, tmp_path / "straight", resume=True, ignore=["rotary.x"])
