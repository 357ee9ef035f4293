"""The tensors of a pack, written sample by sample."""

from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vlbridge.data.chat import Sample
from megatron_vlbridge.data.packing.patch_memory import PatchMemory
from megatron_vlbridge.errors import VLBridgeError

IGNORE_INDEX = -100


class PackWriter:
    """A pack of at most `most_patches` to which samples are added; of them nothing is kept but what is written.

    Raises VLBridgeError: there are no samples, or their total length exceeds `seq_length`.

    Example: see `packs.build_pack`, which describes the tensors.
    """

    def __init__(self, seq_length: int, pad_token_id: int, most_patches: int, memory: PatchMemory) -> None:
        self._tokens = np.full(seq_length, pad_token_id, np.int64)
        self._supervised = np.zeros(seq_length, bool)
        self._weights: NDArray[np.float32] | None = None
        self._lengths: list[int] = []
        self._used = 0
        self._image_grids: list[list[list[int]]] = []
        self._video_grids: list[list[list[int]]] = []
        self._images, self._videos = _PatchWriter(memory, most_patches), _PatchWriter(memory, most_patches)

    def add(self, sample: Sample) -> None:
        """Write the next sample."""
        ids, supervised = sample.input_ids.numpy(), sample.loss_mask.numpy()
        place = slice(self._used, self._used + len(ids))
        if place.stop > len(self._tokens):
            raise self._wrong([*self._lengths, len(ids)])
        self._lengths.append(len(ids))
        self._used = place.stop
        self._tokens[place], self._supervised[place] = ids, supervised
        if sample.loss_weights is not None:
            if self._weights is None:
                self._weights = np.ones(len(self._tokens), np.float32)
            self._weights[place] = np.where(supervised, sample.loss_weights.numpy(), 1)
        self._image_grids.append(sample.image_grid_thw.tolist())
        self._video_grids.append(sample.video_grid_thw.tolist())
        self._images.add(sample.pixel_values)
        self._videos.add(sample.pixel_values_videos)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all samples, padded at the end."""
        if not self._lengths:
            raise self._wrong([])
        labels = next_of_segment(np.where(self._supervised, self._tokens, IGNORE_INDEX), self._lengths, IGNORE_INDEX)
        pack = {
            "tokens": torch.from_numpy(self._tokens),
            "labels": torch.from_numpy(labels),
            "segment_lengths": torch.tensor(self._lengths),
            "pixel_values": self._images.joined(),
            "image_grid_thw": _joined_grids(self._image_grids),
            "pixel_values_videos": self._videos.joined(),
            "video_grid_thw": _joined_grids(self._video_grids),
            "images_per_segment": torch.tensor([len(grids) for grids in self._image_grids]),
            "videos_per_segment": torch.tensor([len(grids) for grids in self._video_grids]),
        }
        if self._weights is not None:
            pack["loss_weights"] = torch.from_numpy(next_of_segment(self._weights, self._lengths, 1))
        return pack

    def _wrong(self, lengths: list[int]) -> VLBridgeError:
        return VLBridgeError(
            f"pack: expected at least one sample and at most {len(self._tokens)} tokens, found {len(lengths)} samples "
            f"of {lengths} tokens"
        )


def next_of_segment[T: np.generic](values: NDArray[T], lengths: list[int], last: int) -> NDArray[T]:
    """For each token `[L]` of segments of these lengths the value of the next one of its segment, or `last`.

    Example: `next_of_segment(np.array([1, 2, 3, 4, 9]), [2, 2], 0)` is `[2, 0, 4, 0, 0]`.
    """
    result = np.full_like(values, last)
    result[:-1] = values[1:]
    result[np.cumsum(lengths) - 1] = last
    return result


def _joined_grids(grids: list[list[list[int]]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(grids)), dtype=torch.int64).view(-1, 3)


class _PatchWriter:
    """The patches of the images or of the videos of a pack, `most` or fewer."""

    def __init__(self, memory: PatchMemory, most: int) -> None:
        self._memory, self._most, self._count = memory, most, 0
        self._whole = torch.zeros(0, 0)

    def add(self, patches: Tensor) -> None:
        """Add those of a sample `[P, ...]`; if they are all of the pack, they are not copied."""
        size = patches.numel()
        if not size or patches.shape[0] == self._most:
            if size or not self._whole.numel():
                self._whole = patches
            return
        if not self._count:
            self._shape = patches.shape[1:]
            self._floats = self._memory.take(self._most * self._shape.numel())
        start = self._count * self._shape.numel()
        self._floats[start : start + size] = patches.reshape(-1).numpy()
        self._count += len(patches)

    def joined(self) -> Tensor:
        """All patches `[P, ...]`."""
        if not self._count:
            return self._whole
        return self._memory.lend(self._floats, self._count * self._shape.numel()).view(-1, *self._shape)
