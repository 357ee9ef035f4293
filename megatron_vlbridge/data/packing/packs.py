"""Packing: which conversations share a pack, and the tensors of a pack."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_vlbridge.data.chat import Sample
from megatron_vlbridge.data.packing.pack_writer import IGNORE_INDEX, PackWriter, next_of_segment
from megatron_vlbridge.data.packing.patch_memory import PatchMemory
from megatron_vlbridge.errors import VLBridgeError


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into packs of at most `capacity` tokens: best fit, in the order given.

    Each sample goes into the fullest pack that still has space for it (the oldest on a tie), otherwise into a new one.
    Every sample is in exactly one pack. Packs are ordered by their first sample, and the indices in a pack ascend.
    Samples are not sorted by length first: that would fill the packs slightly better, but the same samples would share
    a pack in every epoch, however they are shuffled.

    Raises VLBridgeError: a length is not positive or exceeds the capacity.
    Example: `best_fit([5, 8, 3, 4], capacity=10)` is `[[0, 2], [1], [3]]`.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise VLBridgeError(
                f"sample {index}: expected a length from 1 to the pack capacity of {capacity} tokens, found {length}"
            )
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (free tokens, index of the pack), sorted; fuller packs are dropped
    shortest = min(lengths, default=0)
    for index, length in enumerate(lengths):
        best = bisect_left(open_packs, (length, 0))
        if best < len(open_packs):
            free, target = open_packs.pop(best)
        else:
            free, target = capacity, len(packs)
            packs.append([])
        packs[target].append(index)
        if free - length >= shortest:
            insort(open_packs, (free - length, target))
    return packs


def build_pack(samples: Sequence[Sample], seq_length: int, pad_token_id: int) -> dict[str, Tensor]:
    """Concatenate the samples to one micro-batch, padded at the end to `seq_length` tokens.

    A label is the next token of the same sample, or -100 where that token is not supervised; the last token of a
    sample and padding have -100.

    Keys: `tokens` int64 `[T]`, `labels` int64 `[T]`, `segment_lengths` int64 `[n]`, `pixel_values` and
    `pixel_values_videos` float32 `[P, patch_dim]`, `image_grid_thw` and `video_grid_thw` int64 `[k, 3]`,
    `images_per_segment` and `videos_per_segment` int64 `[n]`. All are always there; without media there are 0 patches.
    Where a message has a weight, also `loss_weights` float32 `[T]`, those of the labels, 1 where there is no label.

    Raises VLBridgeError: there are no samples, or their total length exceeds `seq_length`.
    """
    most = sum(sample.pixel_values.shape[0] + sample.pixel_values_videos.shape[0] for sample in samples)
    pack = PackWriter(seq_length, pad_token_id, most, PatchMemory())
    for sample in samples:
        pack.add(sample)
    return pack.tensors()


def next_token_labels(samples: Sequence[Sample]) -> Tensor:
    """Int64 `[L]` of all samples: for each token the next one of its sample if that is supervised, else -100."""
    learned = [sample.input_ids.masked_fill(~sample.loss_mask, IGNORE_INDEX).numpy() for sample in samples]
    return torch.from_numpy(next_of_segment(np.concatenate(learned), list(map(len, learned)), IGNORE_INDEX))
