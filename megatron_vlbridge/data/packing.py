"""Which conversations share a pack, and the pack's tensors."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vlbridge.data.chat import Sample
from megatron_vlbridge.errors import VLBridgeError

IGNORE = -100


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into packs of at most `capacity` tokens: best fit, in the order given.

    Each sample goes into the fullest pack that still has room for it (the oldest of equals), else into a new one.
    Every sample is in exactly one pack; packs are in the order of their first sample, and samples rise inside a pack.
    The result depends on the arguments alone. Samples are not sorted by length first: that would fill packs a little
    better, but then the same samples would meet each other however they are shuffled.

    Args:
        lengths: tokens of each sample, positive.
        capacity: tokens of a pack.

    Raises:
        VLBridgeError: a sample is not positive or longer than the capacity.

    Example:
        >>> pack([5, 8, 3, 4], capacity=10)
        [[0, 2], [1], [3]]
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise VLBridgeError(
                f"sample {index}: expected a length from 1 to the capacity of a pack, {capacity} tokens, found {length}"
            )
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), sorted; a pack too full for any sample is not kept
    smallest = min(lengths, default=0)
    for index, length in enumerate(lengths):
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
            packs[number].append(index)
        else:
            room, number = capacity, len(packs)
            packs.append([index])
        if room - length >= smallest:
            insort(rooms, (room - length, number))
    return packs


def build_pack(samples: Sequence[Sample], seq_length: int, pad_token_id: int) -> dict[str, Tensor]:
    """One micro-batch from the samples in order, padded at the end to `seq_length` tokens.

    Labels are the next token inside the sample, -100 where it is not to be learned: a sample's last token never has
    one, nor does padding.

    Returns:
        `tokens` int64 `[T]`, `labels` int64 `[T]`, `segment_lengths` int64 `[n]`, `pixel_values` and
        `pixel_values_videos` float32 `[P, patch_dim]`, `image_grid_thw` and `video_grid_thw` int64 `[k, 3]`,
        `images_per_segment` and `videos_per_segment` int64 `[n]`. All are always there; without media the patches
        have no rows.

    Raises:
        VLBridgeError: there is no sample, or they are longer than `seq_length` together.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    if not samples or sum(lengths) > seq_length:
        raise VLBridgeError(
            f"pack: expected at least one sample and at most {seq_length} tokens, found {len(samples)} samples of "
            f"{lengths} tokens"
        )
    padding = seq_length - sum(lengths)
    return {
        "tokens": torch.cat([*(sample.input_ids for sample in samples), torch.full((padding,), pad_token_id)]),
        "labels": torch.cat([*(next_token_labels(sample) for sample in samples), torch.full((padding,), IGNORE)]),
        "segment_lengths": torch.tensor(lengths),
        "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
        "image_grid_thw": torch.cat([sample.image_grid_thw for sample in samples]),
        "pixel_values_videos": torch.cat([sample.pixel_values_videos for sample in samples]),
        "video_grid_thw": torch.cat([sample.video_grid_thw for sample in samples]),
        "images_per_segment": torch.tensor([len(sample.image_grid_thw) for sample in samples]),
        "videos_per_segment": torch.tensor([len(sample.video_grid_thw) for sample in samples]),
    }


def next_token_labels(sample: Sample) -> Tensor:
    """Int64 `[L]`: at each token the one after it where that is to be learned, else -100."""
    labels = sample.input_ids.masked_fill(~sample.loss_mask, IGNORE).roll(-1)
    labels[-1] = IGNORE
    return labels
