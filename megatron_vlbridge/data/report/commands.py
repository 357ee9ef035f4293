"""What `vlbridge data` does: measure, check and pack the conversations of a data file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor, ProcessorMixin

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.dataset import PackedConversations, check_processor
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.lengths.build import build_table
from megatron_vlbridge.data.lengths.fingerprint import fingerprint, open_table, table_path
from megatron_vlbridge.data.lengths.measure import Measure, tools_of
from megatron_vlbridge.data.lengths.turn_counts import TurnCounts
from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.packing.offline import PackingOptions
from megatron_vlbridge.data.packing.selection import Selection
from megatron_vlbridge.data.report.packing import PackReport, pack_report
from megatron_vlbridge.data.report.summary import Summary, summarize
from megatron_vlbridge.data.sources.meta import read_meta
from megatron_vlbridge.data.sources.mixture import Mixture, open_data
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import read_config

# Called with a split and the numbers of its conversations that are done, and of all.
type Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Data:
    """A data file (see `sources.meta`), the model whose processor encodes it, and how it is encoded."""

    path: Path
    processor: ProcessorMixin
    config: Config
    media: MediaOptions
    labels: LabelOptions
    literal_tags: bool = False

    @classmethod
    def open(cls, path: str | Path, hf_folder: str | Path, **options: Any) -> "Data":
        """With the processor of a Hugging Face folder.

        Raises VLBridgeError: the folder has no config or processor, or they do not match.
        """
        config = read_config(hf_folder)
        try:
            processor = AutoProcessor.from_pretrained(hf_folder)
        except (OSError, ValueError) as error:
            raise VLBridgeError(f"{hf_folder}: cannot load the processor: {error}") from error
        check_processor(processor, config)
        return cls(Path(path), processor, config, **options)

    def splits(self) -> list[tuple[str, Mixture]]:
        """The splits that the file has, and their conversations."""
        found = []
        for split in read_meta(self.path):
            conversations = open_data(self.path, split, literal_tags=self.literal_tags)
            assert conversations is not None
            found.append((split, conversations))
        return found

    @property
    def measure(self) -> Measure:
        """Measures a conversation as it is encoded."""
        return Measure(self.processor, self.config.vision.hidden_size, self.media, self.labels)


@dataclass(frozen=True)
class Indexed:
    """A table of lengths that was written: its file, what it counts, and the text of the first failure."""

    path: Path
    conversations: int
    tokens: int
    failed: int
    first_failed: str
    turns: TurnCounts


def index(data: Data, *, workers: int, progress: Progress) -> Iterator[Indexed]:
    """Write the table of lengths of each split beside the data file (see `lengths.build`)."""
    for split, conversations in data.splits():
        path = table_path(data.path, split)
        table = build_table(
            conversations,
            data.measure,
            path,
            fingerprint(conversations, data.measure),
            workers=workers,
            progress=partial(progress, split),
        )
        tokens = table.rows["tokens"]
        first = table.first_failed.text if table.first_failed else ""
        total = int(tokens.sum(dtype=np.int64))
        yield Indexed(path, len(tokens), total, int(table.failed.sum()), first, table.count_turns())


def check(data: Data, *, show: int, progress: Progress) -> Iterator[Summary]:
    """Encode every conversation of each split, media included; `show` of a split are kept to look at."""

    def encode(conversation: Conversation) -> Sample:
        tools = tools_of(conversation)
        return encode_conversation(conversation, data.processor, tools=tools, media=data.media, labels=data.labels)

    for split, conversations in data.splits():
        yield summarize(
            split,
            conversations,
            encode,
            data.processor,
            show=show,
            media=data.media,
            progress=partial(progress, split),
        )


def pack(
    data: Data,
    *,
    seq_length: int,
    multiple_of: int,
    packing: PackingOptions,
    seed: int,
    data_parallel: int,
    max_bad_samples: float,
) -> Iterator[tuple[str, PackReport, Selection]]:
    """The packs of the first epoch of each split, and which conversations are in them."""
    for split, conversations in data.splits():
        dataset = PackedConversations(
            conversations,
            data.processor,
            data.config,
            seq_length=seq_length,
            num_samples=1,
            seed=seed,
            multiple_of=multiple_of,
            media=data.media,
            labels=data.labels,
            packing=packing,
            lengths=open_table(data.path, split, conversations, data.measure),
            max_bad_samples=max_bad_samples,
            log=False,
        )
        report = pack_report(
            dataset.epoch_packs(0),
            dataset.lengths,
            dataset.patches,
            dataset.work,
            seq_length=seq_length,
            multiple_of=multiple_of,
            data_parallel=data_parallel,
        )
        yield split, report, dataset.selection
