"""Conversations that cannot be encoded end the run, or are left out and replaced, the same in every process."""

import gc
import json
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Qwen3VLProcessor

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.conversations import read_conversations
from megatron_vlbridge.data.dataset import PackedConversations
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.lengths.table import LengthTable
from megatron_vlbridge.errors import VLBridgeError
from tests.errors import rejects
from tests.unit.test_dataset import config, equal, processor

__all__ = ["config", "processor"]  # fixtures

COUNT, CUT, MISSING = 60, (7, 31), (12,)


def write(folder: Path, cut: tuple[int, ...], missing: tuple[int, ...] = ()) -> Path:
    """Conversations with one image each; of some the file is cut after its header, or missing."""
    random = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as file:
        for index in range(COUNT):
            path = folder / f"{index}.png"
            Image.fromarray(random.integers(0, 256, (8 * random.integers(1, 4), 16, 3), dtype=np.uint8)).save(path)
            if index in cut:
                path.write_bytes(path.read_bytes()[:100])
            if index in missing:
                path.unlink()
            question = [{"type": "image", "image": path.name}, {"type": "text", "text": "hello " * (index % 5)}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"seven {index}"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder / "train.jsonl"


def make(path: Path, processor: Qwen3VLProcessor, config: Config, share: float) -> PackedConversations:
    return PackedConversations(
        read_conversations(path),
        processor,
        config,
        seq_length=128,
        num_samples=24,
        seed=5,
        max_bad_samples=share,
    )


def samples_of(pack: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    lengths = pack["segment_lengths"]
    return list(pack["tokens"][: int(lengths.sum())].split(lengths.tolist()))


def test_a_broken_image_is_replaced_by_another_conversation(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, CUT)
    dataset = make(path, processor, config, 0.05)
    whole = write_whole(tmp_path / "whole", processor)
    with caplog.at_level(logging.WARNING):
        packs = [dataset[index] for index in range(24)]
    drawn = [member for index in range(24) for member in dataset.members(index)]
    replaced = 0
    for index, pack in enumerate(packs):
        for member, found in zip(dataset.members(index), samples_of(pack), strict=True):
            if member not in CUT:
                assert torch.equal(found, whole[member])
                continue
            replaced += 1
            others = [number for number, tokens in enumerate(whole) if torch.equal(tokens, found)]
            assert len(others) == 1
            assert others[0] not in CUT
            assert len(found) <= len(whole[member])
        assert len(pack["pixel_values"]) == int(pack["image_grid_thw"].prod(1).sum())
        assert pack["replaced_per_source"].tolist() == [sum(member in CUT for member in dataset.members(index))]
    assert replaced == sum(member in CUT for member in drawn) >= 4
    assert sorted(dataset.replacements.failures) == list(CUT)
    logged = {int(record.getMessage().split("line ")[1].split(":")[0]) for record in caplog.records}
    assert logged == {index + 1 for index in CUT}
    assert len(caplog.records) == len(CUT)


def test_a_replaced_sample_keeps_no_pack_alive(processor: Qwen3VLProcessor, config: Config, tmp_path: Path) -> None:
    dataset = make(write(tmp_path, CUT), processor, config, 0.05)
    index = next(index for index in range(24) if set(CUT) & set(dataset.members(index)))
    gc.disable()
    try:
        pack = dataset[index]
        alive = weakref.ref(pack["tokens"])
        del pack
        assert alive() is None
    finally:
        gc.enable()


def write_whole(folder: Path, processor: Qwen3VLProcessor) -> list[torch.Tensor]:
    """The tokens of the same conversations with no file broken."""
    folder.mkdir()
    path = write(folder, ())
    return [encode_conversation(one, processor).input_ids for one in read_conversations(path)]


def test_every_process_replaces_alike(processor: Qwen3VLProcessor, config: Config, tmp_path: Path) -> None:
    path = write(tmp_path, CUT, MISSING)
    expected = [make(path, processor, config, 0.1)[index] for index in range(24)]
    resumed = make(path, processor, config, 0.1)
    assert all(equal(resumed[index], expected[index]) for index in (23, 3, 11))
    for pack, other in zip(expected, DataLoader(resumed, batch_size=1, num_workers=2), strict=True):
        assert equal({key: value[0] for key, value in other.items()}, pack)


def test_without_a_share_the_first_failure_ends_the_run(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path
) -> None:
    path = write(tmp_path, CUT)
    dataset = make(path, processor, config, 0)
    with rejects("message 0 (user), part 0: image:", "cannot be decoded", start=f"{path}, line "):
        for index in range(24):
            dataset[index]
    (tmp_path / "7.png").unlink()
    with rejects("line 8: message 0 (user), part 0: image: no file", "7.png"):
        make(path, processor, config, 0)


def test_those_that_cannot_be_measured_are_left_out(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, (), (*MISSING, 40))
    with path.open("a") as file:
        file.write('{"messages": 3}\n')
    with rejects("3 of 61 conversations", "more than --max-bad-samples 0.04", "line 13:"):
        make(path, processor, config, 0.04)
    with caplog.at_level(logging.WARNING):
        dataset = make(path, processor, config, 0.05)
    assert dataset.selection.failed == [12, 40, 60]
    assert not {12, 40, 60} & {member for index in range(24) for member in dataset.members(index)}
    assert [record.getMessage() for record in caplog.records] == [dataset.selection.failed_report]
    assert "3 of 61 conversations cannot be encoded (first: " in dataset.selection.failed_report
    assert "12.png" in dataset.selection.failed_report


def test_a_table_of_lengths_replaces_measuring(processor: Qwen3VLProcessor, config: Config, tmp_path: Path) -> None:
    conversations = read_conversations(write(tmp_path, ()))
    table = Measure(processor, config.vision.hidden_size)(conversations, range(COUNT))
    options = {"seq_length": 128, "num_samples": 24, "seed": 5}
    given = PackedConversations(conversations, processor, config, lengths=table, **options)
    measured = PackedConversations(conversations, processor, config, **options)
    assert all(equal(given[index], measured[index]) for index in range(8))
    fewer = table.rows.copy()
    fewer["patches"] -= 1
    drift = "when it was measured"
    for rows, error in ((table.rows[:-1], "expected those of 60"), (table.rows[::-1], drift), (fewer, drift)):
        with rejects(error):
            other = PackedConversations(conversations, processor, config, lengths=LengthTable(rows), **options)
            _ = [other[index] for index in range(24)]
    with pytest.raises(VLBridgeError):
        PackedConversations(conversations, processor, config, lengths=table, max_bad_samples=1.5, **options)
