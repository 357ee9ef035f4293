"""Interrupted runs: what is finished is continued to the same bytes, and never under changed conditions."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_vlbridge.checkpoint import safetensors, torch_dist_writer
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.engine import Options, Progress
from megatron_vlbridge.errors import VLBridgeError
from tests import reference


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("model") / "hf", layers=2)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    """Tens of parts for a tiny checkpoint."""
    monkeypatch.setattr(safetensors, "PART_BYTES", 20_000)
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


def interrupt(source: Path, target: Path, parts: int = 5, **arguments) -> Path:
    """An import that is interrupted; gives its work folder."""
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(source, target, options=stop_after(parts), **arguments)
    assert not target.exists()
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

    with pytest.raises(VLBridgeError, match="memory: expected at least"):
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


def test_other_options_are_refused(source, tmp_path):
    interrupt(source, tmp_path / "megatron")
    with pytest.raises(VLBridgeError, match="with the same options, found"):
        import_checkpoint(source, tmp_path / "megatron", dtype="bfloat16", resume=True)


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
    import_checkpoint(source, tmp_path / "megatron", resume=True)
    assert files_of(tmp_path / "megatron") == expected


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


def test_a_run_that_waits_for_nobody_after_another_was_killed(source, tmp_path):
    """The lock goes with the process: a lock file that is left over keeps nobody out."""
    work = interrupt(source, tmp_path / "megatron")
    assert (work / "lock").exists()
    import_checkpoint(source, tmp_path / "megatron", resume=True)


def test_what_is_left_after_the_rename_is_swept(source, tmp_path):
    import_checkpoint(source, tmp_path / "megatron")
    work = tmp_path / ".megatron.vlbridge"
    work.mkdir()
    (work / "lock").touch()
    with pytest.raises(VLBridgeError, match="expected a name that is free"):
        import_checkpoint(source, tmp_path / "megatron", resume=True)
    assert names_of(tmp_path) == {"hf", "megatron"}


def test_a_journal_without_its_result_is_no_hindrance(source, tmp_path):
    """Killed between the rename and the tidying, and the result removed since."""
    expected = files_of(import_checkpoint(source, tmp_path / "straight"))
    work = interrupt(source, tmp_path / "megatron")
    shutil.rmtree(work / "result")
    import_checkpoint(source, tmp_path / "megatron", resume=True)
    assert files_of(tmp_path / "megatron") == expected


def test_a_disk_that_is_too_small_is_found_before_the_first_byte(source, tmp_path):
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
    (source / safetensors.INDEX).unlink()
    del tensors["lm_head.weight"]
    specs = {name: safetensors.TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    specs["model.language_model.embed_tokens.weight"] = safetensors.TensorSpec((rows, 64), torch.float32)
    header = safetensors.encode_header(specs)
    with (source / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
    begun = threading.Event()
    with pytest.raises(VLBridgeError, match=r"expected room for \d{13} bytes, found"):
        import_checkpoint(source, tmp_path / "megatron", options=Options(report=lambda _progress: begun.set()))
    assert not begun.is_set()
    assert names_of(tmp_path) == {"hf"}


def test_a_source_that_ends_early_while_it_is_read_is_named_and_the_work_kept(source, tmp_path):
    index = json.loads((source / safetensors.INDEX).read_text())
    shard = source / index["weight_map"]["model.visual.deepstack_merger_list.1.linear_fc2.bias"]  # written last

    def report(_progress: Progress) -> None:
        with shard.open("r+b") as stream:
            stream.truncate(8)

    with pytest.raises(VLBridgeError, match=rf"{shard.name}: expected to read .*too early.*finished parts are kept"):
        import_checkpoint(source, tmp_path / "megatron", options=Options(workers=1, report=report))
    assert not (tmp_path / "megatron").exists()
