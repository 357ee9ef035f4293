"""What a run has read of its training data, per source: in each checkpoint, and at the end."""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vlbridge.checkpoint.live.collectives import gather, rank_and_size
from megatron_vlbridge.checkpoint.stream.json_file import load_json_object
from megatron_vlbridge.data.dataset import PackedConversations
from megatron_vlbridge.data.packing.source_counts import SourceCounter, SourceCounts
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.launch.start import loads_checkpoint, started_from

DATA_COUNTS = "vlbridge_data.json"
"""The file, in the folder of an iteration: for each source what `SourceCounts` has."""


class DataCounts:
    """Counts the training data of a run; one on each rank.

    `dataset` gives the training dataset, or another value where the rank has none, or one that is not a
    `PackedConversations`: then nothing is counted. `replaced` gives how many conversations this rank counted as
    replaced, by the index of the source. A resumed run continues from the file of the checkpoint. Nothing is counted
    with a `--dataloader-type` other than single, which reads packs in another order.

    Raises VLBridgeError: that file is damaged.
    """

    def __init__(
        self, args: argparse.Namespace, dataset: Callable[[], Any], replaced: Callable[[], Counter[int]]
    ) -> None:
        self._args, self._dataset, self._replaced = args, dataset, replaced
        self._counter: SourceCounter | None = None
        folder = started_from(args) if loads_checkpoint(args) and not args.finetune else None
        self._before = _read_replaced(folder / DATA_COUNTS) if folder else {}

    def counts(self) -> list[SourceCounts]:
        """Those of each source so far; empty but on the first rank. Collective over all ranks."""
        replaced_now = sum(gather(self._replaced()), Counter[int]())
        dataset = self._dataset()
        in_order = self._args.dataloader_type == "single"
        if rank_and_size()[0] or not in_order or not isinstance(dataset, PackedConversations):
            return []
        self._counter = self._counter or SourceCounter(dataset)
        names = dataset.source_names
        replaced = [self._before.get(name, 0) + replaced_now[index] for index, name in enumerate(names)]
        return self._counter(self._args.consumed_train_samples, replaced)

    def save(self, folder: Path) -> None:
        """Write the file. Collective over all ranks."""
        counts = self.counts()
        if counts:
            text = json.dumps({"sources": [asdict(one) for one in counts]}, indent=1)
            (folder / DATA_COUNTS).write_text(text + "\n", encoding="utf-8")


def _read_replaced(path: Path) -> dict[str, int]:
    """How many conversations of each source were replaced; nothing if the file does not exist."""
    if not path.exists():
        return {}
    try:
        return {str(one["source"]): int(one["replaced"]) for one in load_json_object(path)["sources"]}
    except (KeyError, TypeError, ValueError) as error:
        raise VLBridgeError(f"{path}: expected the counts of sources, found another value. Copy it again.") from error
