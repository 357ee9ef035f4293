"""A resumed run reads the packs that follow, whatever its number of loader processes and its data-parallel size."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader
from transformers import Qwen3VLProcessor

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.dataset import PackedConversations
from tests.cases import in_turn
from tests.unit.test_dataset import PACKINGS, config, equal, make_dataset, processor

__all__ = ["config", "processor"]  # fixtures

GLOBAL_BATCH = 4
PLACES = random.Random(0).sample(range(0, 60 - 2 * GLOBAL_BATCH, GLOBAL_BATCH), 10)
CASES = [
    (name, consumed, (0, 1, 2, 4)[index % 4])
    for name in ("best-fit", "limits")
    for index, consumed in enumerate(PLACES)
]


def loader(dataset: PackedConversations, consumed: int, workers: int, rank: int, size: int) -> Iterator[Any]:
    """The micro-batches of a data-parallel rank, as Megatron reads them."""
    sampler = MegatronPretrainingSampler(len(dataset), consumed, 1, rank, size)
    return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))


@pytest.mark.parametrize(("packing", "consumed", "workers"), in_turn(CASES, 3))
def test_consumed_samples_are_the_whole_state(
    processor: Qwen3VLProcessor, config: Config, packing: str, consumed: int, workers: int
) -> None:
    """Two global batches after `consumed` packs, at a data-parallel size of 1, 2 and 4."""
    uninterrupted = make_dataset(processor, config, PACKINGS[packing])
    expected = [uninterrupted[index] for index in range(consumed + 2 * GLOBAL_BATCH)][consumed:]
    for size in (1, 2, 4):
        resumed = make_dataset(processor, config, PACKINGS[packing])
        ranks = [loader(resumed, consumed, workers, rank, size) for rank in range(size)]
        found = [next(ranks[index % size]) for index in range(2 * GLOBAL_BATCH)]
        for pack, other in zip(expected, found, strict=True):
            assert equal({key: value[0] for key, value in other.items()}, pack)
