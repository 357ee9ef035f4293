"""Memory for the patches of packs that is used again.

A pack has 25 MB of patches for each image of 1024 x 1024. The kernel clears each page of new memory, which takes
several times as long as the copy of the patches to it.
"""

import weakref
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 2  # pieces of memory that wait for a pack

type Floats = NDArray[np.float32]


class PatchMemory:
    """The memory of one process for patches; a piece is free again when no tensor has it any more.

    Example: `memory.lend(memory.take(100), 80)` is a tensor of 80 floats.
    """

    def __init__(self) -> None:
        self._free: list[Floats] = []
        # glibc keeps as much free memory as twice the largest block, of up to 32 MB, that was freed (mallopt(3)). So
        # the image processor, too, has the memory of the image before.
        torch.empty(31 << 20, dtype=torch.uint8)

    def __reduce__(self) -> tuple[type["PatchMemory"], tuple[()]]:
        return PatchMemory, ()

    def take(self, size: int) -> Floats:
        """At least `size` floats, of any values."""
        with suppress(IndexError):  # none is left
            while len(memory := self._free.pop()) < size:
                pass
            return memory
        new: Floats = torch.empty(size).numpy()
        return new

    def lend(self, memory: Floats, size: int) -> Tensor:
        """The first `size` floats as a tensor, float32 `[size]`."""
        part = memory[:size]
        weakref.finalize(part, self._give_back, memory).atexit = False
        return torch.from_numpy(part)

    def _give_back(self, memory: Floats) -> None:
        if len(self._free) < KEPT:
            self._free.append(memory)
