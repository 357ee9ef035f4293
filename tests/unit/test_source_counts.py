"""The counts of sources are those of the packs, one by one."""

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import Qwen3VLProcessor

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.dataset import PackedConversations
from megatron_vlbridge.data.packing.offline import PackingOptions
from megatron_vlbridge.data.packing.source_counts import SourceCounter, SourceCounts
from megatron_vlbridge.data.sources.mixture import open_data
from megatron_vlbridge.training.metrics.data_counts import DataCounts
from tests.errors import rejects
from tests.unit.test_dataset import config, processor

__all__ = ["config", "processor"]  # fixtures

SIZES, WEIGHTS = (9, 1, 14), (1, 2.5, 0.3)


@pytest.fixture
def dataset(processor: Qwen3VLProcessor, config: Config, tmp_path: Path) -> PackedConversations:
    """Three sources; of the last, one conversation is too long, and one becomes shorter."""
    question, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "seven"}
    skipped = {"role": "assistant", "content": "x", "train": False}
    for number, size in enumerate(SIZES):
        with (tmp_path / f"{number}.jsonl").open("w") as lines:
            for index in range(size):
                messages = [question, answer] * (1 + index % 3)
                if index == 2:
                    messages = [question, skipped, *messages]
                if (number, index) in ((2, 5), (2, 6)):
                    messages = [*messages[: 2 * (index - 5)], {"role": "user", "content": " hello" * 99}, answer]
                lines.write(json.dumps({"messages": messages}) + "\n")
    meta = tmp_path / "meta.yaml"
    sources = [{"path": f"{number}.jsonl", "weight": weight} for number, weight in enumerate(WEIGHTS)]
    meta.write_text(json.dumps({"train": sources}))
    options = {"seq_length": 96, "num_samples": 60, "packing": PackingOptions(too_long="truncate")}
    return PackedConversations(open_data(meta), processor, config, **options)


def test_counts_equal_those_of_the_packs(dataset: PackedConversations) -> None:
    """For numbers of packs in ascending and descending order, in the middle and at the end of epochs."""
    counter = SourceCounter(dataset)
    epoch = len(dataset.epoch_packs(0))
    for num_packs in (0, 1, epoch - 1, epoch, epoch + 1, 50, 2 * epoch, 3, 60):
        read = Counter(source_of(member) for item in range(num_packs) for member in dataset.members(item))
        found = counter(num_packs, [7, 8, 9])
        assert [one.read for one in found] == [read[source] for source in range(3)]
        assert [one.replaced for one in found] == [7, 8, 9]
        assert [Path(one.source).name for one in found] == ["0.jsonl", "1.jsonl", "2.jsonl"]
        assert [one.conversations for one in found] == list(SIZES)
        assert [(one.dropped, one.truncated, one.failed) for one in found] == [(0, 0, 0), (0, 0, 0), (1, 1, 0)]
        turns = [[1 + index % 3 + (index == 2) for index in range(size)] for size in SIZES]
        turns[2][5], turns[2][6] = 0, 1
        assert [one.assistant_turns for one in found] == [sum(source) for source in turns]
        assert [one.unlearned_turns for one in found] == [1, 0, 1]


def source_of(member: int) -> int:
    return 0 if member < SIZES[0] else 1 if member < SIZES[0] + SIZES[1] else 2


def test_the_text_has_only_what_there_is() -> None:
    assert str(SourceCounts("a", 1500, 0, 0, 0, 7, 0, 2000, 0)) == "a: 2,000 read; of 1,500 conversations none left out"
    assert str(SourceCounts("a", 9, 1, 2, 3, 7, 4, 5, 6)) == (
        "a: 5 read, 6 replaced; of 9 conversations 1 dropped, 2 truncated, 3 invalid, 4 of 7 answers not learned"
    )


def counts_of_run(dataset: object, folder: Path, replaced: Counter[int], **settings: object) -> DataCounts:
    """Of the only rank of a run that has read 50 packs."""
    given = {"load": None, "ckpt_step": None, "pretrained_checkpoint": None, "finetune": False}
    settings = given | {"dataloader_type": "single", "consumed_train_samples": 50} | settings
    return DataCounts(argparse.Namespace(**settings), lambda: dataset, lambda: replaced)


def test_a_run_adds_what_it_replaces_to_the_counts_of_its_checkpoint(
    dataset: PackedConversations, tmp_path: Path
) -> None:
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    counts_of_run(dataset, tmp_path, Counter({0: 3, 2: 5})).save(folder)
    resumed = counts_of_run(dataset, tmp_path, Counter({1: 1, 2: 2}), load=str(tmp_path))
    assert resumed.counts() == SourceCounter(dataset)(50, [3, 1, 7])
    finetuned = counts_of_run(dataset, tmp_path, Counter({1: 1}), load=str(tmp_path), finetune=True)
    assert [one.replaced for one in finetuned.counts()] == [0, 1, 0]
    for text in ('{"sources": [{"source": "a"}]}', '{"sources": [{"source": "a", "replaced": "x"}]}', "{}"):
        (folder / "vlbridge_data.json").write_text(text)
        with rejects(str(folder / "vlbridge_data.json"), "expected the counts of sources"):
            counts_of_run(dataset, tmp_path, Counter(), load=str(tmp_path))


def test_nothing_is_counted_of_other_datasets_and_orders(dataset: PackedConversations, tmp_path: Path) -> None:
    for other, loader in ((None, "single"), ([1], "single"), (dataset, "cyclic"), (dataset, "external")):
        counts = counts_of_run(other, tmp_path, Counter(), dataloader_type=loader)
        assert counts.counts() == []
        counts.save(tmp_path)
    assert not (tmp_path / "vlbridge_data.json").exists()
