"""What ranks that read the same pack share of it, in a few bytes."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

_PARTS = {
    "tokens": ("tokens",),
    "labels": ("labels", "loss_weights"),
    "segment_lengths": ("segment_lengths",),
    "image or video grids": ("image_grid_thw", "video_grid_thw", "images_per_segment", "videos_per_segment"),
    "position_ids": ("position_ids",),
}


@dataclass(frozen=True)
class PackDigest:
    """Checksums of a pack's parts, and its numbers of tokens, segments, images and videos.

    Pixels are not part of it: they are the largest part of a pack, and later pipeline stages do not use them.
    """

    checksums: tuple[int, ...]
    counts: tuple[int, int, int, int]

    @classmethod
    def of(cls, pack: Mapping[str, Any]) -> Self:
        """Of a pack on the host; `loss_weights` (float32) and `position_ids` may be missing or None."""
        sizes = (pack["tokens"].numel(), *(len(pack[key]) for key in ("segment_lengths", "image_grid_thw")))
        checksums = tuple(_checksum([pack.get(key) for key in keys]) for keys in _PARTS.values())
        return cls(checksums, (*sizes, len(pack["video_grid_thw"])))

    @property
    def value(self) -> int:
        """All checksums in one."""
        return zlib.crc32(repr(self.checksums).encode())

    def differences(self, other: Self) -> list[str]:
        """The names of the parts that differ."""
        pairs = zip(_PARTS, self.checksums, other.checksums, strict=True)
        return [name for name, mine, theirs in pairs if mine != theirs]

    def __str__(self) -> str:
        return "{} tokens, {} segments, {} images, {} videos".format(*self.counts)


def _checksum(tensors: list[torch.Tensor | None]) -> int:
    checksum = 0
    for tensor in tensors:
        if tensor is None:
            continue
        checksum = zlib.crc32(repr(tuple(tensor.shape)).encode(), checksum)
        integers = tensor.contiguous().view(torch.int32) if tensor.is_floating_point() else tensor
        checksum = zlib.crc32(integers.to(torch.int64).contiguous().numpy().data, checksum)
    return checksum
