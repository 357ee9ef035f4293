"""What a conversion has written is on the disk before it counts, and is what was meant."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.hf import writer as hf_writer
from megatron_vlbridge.checkpoint.hf.writer import SafetensorsWriter
from megatron_vlbridge.checkpoint.live import save_hf
from megatron_vlbridge.checkpoint.stream.staging import Staging
from megatron_vlbridge.checkpoint.torch_dist import writer as torch_dist_writer
from megatron_vlbridge.checkpoint.torch_dist.writer import ReleaseWriter
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import find
from tests import reference


@dataclass(frozen=True)
class Event:
    """`sync`, `write` or `note` of a file (of its part `number`), `present` or `rename` of the result."""

    what: str
    path: Path
    number: int | None = None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, and `megatron` made from it."""
    folder = tmp_path_factory.mktemp("model")
    import_checkpoint(reference.write_checkpoint(folder / "hf", layers=2), folder / "megatron")
    return folder


class OneRank(torch.nn.Module):
    """A model on one rank that describes its weights as Megatron's models do."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.hf_config = read_config(folder)
        hf = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        self.weights = find(self.hf_config).table(self.hf_config).to_megatron(hf)

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in self.weights.items()}


CONVERT: dict[str, Callable[..., Path]] = {
    "import": lambda model, target: import_checkpoint(model / "hf", target),
    "export": lambda model, target, **options: export_checkpoint(model / "megatron", target, **options),
    "save": lambda model, target, **options: save_hf(OneRank(model / "hf"), target, model / "hf", **options),
}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What happens in a run with tens of parts, in its order; what is `present` is all that the rename moves."""
    found: list[Event] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(hf_writer, "PART_BYTES", 20_000)
    monkeypatch.setattr(torch_dist_writer, "PART_BYTES", 20_000)

    def recorded_fsync(handle: int) -> None:
        fsync(handle)
        found.append(Event("sync", Path(f"/proc/self/fd/{handle}").readlink()))

    def recorded_rename(path: Path, target: Path) -> Path:
        if path.is_dir():
            inside = [path, *path.rglob("*")]
            found.extend(Event("present", place) for place in inside)
            found.append(Event("rename", path))
        return rename(path, target)

    def recorded_write(write: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(writer: Any, number: int, folder: Path, block: Any) -> Any:
            written = write(writer, number, folder, block)
            found.append(Event("write", folder / written.file, number))
            return written

        return recorded

    def recorded_note(staging: Staging, part: Any) -> None:
        found.append(Event("note", staging.folder / part.file, part.index))
        note(staging, part)

    note = Staging.note
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    monkeypatch.setattr(Staging, "note", recorded_note)
    for writer in (SafetensorsWriter, ReleaseWriter):
        monkeypatch.setattr(writer, "write", recorded_write(writer.write))
    return found


@pytest.mark.parametrize("kind", CONVERT)
def test_all_files_and_folders_are_flushed_before_the_result_gets_its_name(
    kind: str, model: Path, tmp_path: Path, events: list[Event]
) -> None:
    CONVERT[kind](model, tmp_path / "new")
    named = next(place for place, event in enumerate(events) if event.what == "rename")
    last_write = max(place for place, event in enumerate(events) if event.what == "write")
    flushed = {event.path for event in events[last_write:named] if event.what == "sync"}
    present = {event.path for event in events if event.what == "present"}
    assert len(present) > 5
    assert {path.name for path in present if path.is_dir()} <= {"result", "hf", "release"}
    assert present <= flushed
    assert Event("sync", tmp_path) in events[named:]


@pytest.mark.parametrize("kind", ["import", "export"])
def test_each_part_is_flushed_before_it_is_noted(kind: str, model: Path, tmp_path: Path, events: list[Event]) -> None:
    CONVERT[kind](model, tmp_path / "new")
    written = {event.number: place for place, event in enumerate(events) if event.what == "write"}
    noted = {event.number: place for place, event in enumerate(events) if event.what == "note"}
    assert written.keys() == noted.keys()
    assert len(written) > 10
    for number, place in written.items():
        assert Event("sync", events[place].path) in events[place : noted[number]], number


def test_each_part_of_a_live_model_is_flushed_by_the_rank_that_wrote_it(
    model: Path, tmp_path: Path, events: list[Event]
) -> None:
    CONVERT["save"](model, tmp_path / "new")
    parts = [place for place, event in enumerate(events) if event.what == "write"]
    assert len(parts) > 10
    assert all(events[place + 1] == Event("sync", events[place].path) for place in parts)


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file in its place, its length included."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def turn_a_shape(header: dict[str, Any]) -> None:
    entry = next(entry for entry in header.values() if len(set(entry.get("shape", []))) > 1)
    entry["shape"].reverse()


def change_a_dtype(header: dict[str, Any]) -> None:
    entry = next(entry for entry in header.values() if entry.get("dtype") == "F32")
    entry["dtype"] = "I32"


def rename_a_tensor(header: dict[str, Any]) -> None:
    name = next(name for name in header if name.endswith("norm.weight"))
    header[f"{name[:-1]}s"] = header.pop(name)


def lose_a_tensor(header: dict[str, Any]) -> None:
    """What is left looks sound: the last tensor and its data are cut off."""
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header["__metadata__"]["cut"] = str(header.pop(last)["data_offsets"][0])


def add_a_tensor(header: dict[str, Any]) -> None:
    """An empty one, so that sizes stay right; all the others are as expected."""
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["stray"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}


def change_hf(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    (path,) = folder.glob("*.safetensors")
    edit_header(path, change)
    if change is lose_a_tensor:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        cut = int(json.loads(content[8 : 8 + length])["__metadata__"]["cut"])
        path.write_bytes(content[: 8 + length + cut])


@pytest.mark.parametrize("kind", ["export", "save"])
@pytest.mark.parametrize("change", [turn_a_shape, change_a_dtype, rename_a_tensor, lose_a_tensor, add_a_tensor])
def test_an_export_that_wrote_something_else_is_rejected(
    change: Callable[[dict[str, Any]], None], kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = SafetensorsWriter.finish

    def finish_wrongly(writer: SafetensorsWriter, folder: Path, written: Any) -> None:
        finish(writer, folder, written)
        change_hf(folder, change)

    monkeypatch.setattr(SafetensorsWriter, "finish", finish_wrongly)
    with pytest.raises(VLBridgeError, match=r"expected to read back .*Read-back mismatch"):
        CONVERT[kind](model, tmp_path / "new", max_shard_size=10**9)
    assert not (tmp_path / "new").exists()


def lose_an_entry(metadata: Any) -> None:
    metadata.state_dict_metadata.pop("language_model.decoder.final_layernorm.weight")


def change_an_entry(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["language_model.decoder.final_layernorm.weight"]
    entry.properties = replace(entry.properties, dtype=torch.int32)


@pytest.mark.parametrize("change", [lose_an_entry, change_an_entry])
def test_an_import_that_wrote_something_else_is_rejected(
    change: Callable[[Any], None], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = ReleaseWriter.finish

    def finish_wrongly(writer: ReleaseWriter, folder: Path, written: Any) -> None:
        finish(writer, folder, written)
        path = folder / "release" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    monkeypatch.setattr(ReleaseWriter, "finish", finish_wrongly)
    with pytest.raises(VLBridgeError, match=r"final_layernorm\.weight: expected to read back .*Read-back mismatch"):
        import_checkpoint(model / "hf", tmp_path / "new")
    assert not (tmp_path / "new").exists()
