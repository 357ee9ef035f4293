"""Packing: which conversations share a pack, and the tensors of a pack."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_vlbridge.data.chat import Sample
from megatron_vlbridge.errors import VLBridgeError

IGNORE_INDEX = -100


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
    lengths = [len(sample.input_ids) for sample in samples]
    if not samples or sum(lengths) > seq_length:
        raise VLBridgeError(
            f"pack: expected at least one sample and at most {seq_length} tokens, found {len(samples)} samples of "
            f"{lengths} tokens"
        )
    padding = seq_length - sum(lengths)
    pack = {
        "tokens": torch.cat([*(sample.input_ids for sample in samples), torch.full((padding,), pad_token_id)]),
        "labels": torch.cat([next_token_labels(samples), torch.full((padding,), IGNORE_INDEX)]),
        "segment_lengths": torch.tensor(lengths),
        "pixel_values": _joined([sample.pixel_values for sample in samples]),
        "image_grid_thw": torch.cat([sample.image_grid_thw for sample in samples]),
        "pixel_values_videos": _joined([sample.pixel_values_videos for sample in samples]),
        "video_grid_thw": torch.cat([sample.video_grid_thw for sample in samples]),
        "images_per_segment": torch.tensor([len(sample.image_grid_thw) for sample in samples]),
        "videos_per_segment": torch.tensor([len(sample.video_grid_thw) for sample in samples]),
    }
    if any(sample.loss_weights is not None for sample in samples):
        pack["loss_weights"] = torch.cat([*(_label_weights(sample) for sample in samples), torch.ones(padding)])
    return pack


def _joined(patches: Sequence[Tensor]) -> Tensor:
    """The patches of all samples; those of a single one that has any are not copied."""
    some = [x for x in patches if len(x)]
    return some[0] if len(some) == 1 else torch.cat(some or list(patches[:1]))


def next_token_labels(samples: Sequence[Sample]) -> Tensor:
    """Int64 `[L]` of all samples: for each token the next one of its sample if that is supervised, else -100."""
    supervised = torch.cat([sample.loss_mask for sample in samples])
    labels = torch.cat([sample.input_ids for sample in samples]).masked_fill_(~supervised, IGNORE_INDEX).roll(-1)
    ends = list(accumulate(len(sample.input_ids) for sample in samples))
    labels[torch.tensor(ends) - 1] = IGNORE_INDEX
    return labels


def _label_weights(sample: Sample) -> Tensor:
    """Float32 `[L]`: the weight of each of `next_token_labels`, 1 where there is none."""
    if sample.loss_weights is None:
        return torch.ones(len(sample.input_ids))
    weights = sample.loss_weights.masked_fill(~sample.loss_mask, 1).roll(-1)
    weights[-1] = 1
    return weights
