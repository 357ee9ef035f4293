"""Memory for the patches of packs that is used again.

A pack has 25 MB of patches for each image of 1024 x 1024. The kernel clears each page of new memory, which takes
several times as long as the copy of the patches to it.
"""

import weakref
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 2  # pieces of memory that wait for a pack

type Floats = NDArray[np.float32]


class PatchMemory:
    """The memory of one process for patches: a piece is used again when no tensor has it any more.

    At most `KEPT` pieces wait, those that came back last; a pack gets none of more than twice its size.

    With `raise_trim_threshold` glibc keeps up to 62 MB of the memory that the process frees: twice the largest block of
    up to 32 MB that was ever freed (mallopt(3)). So the image processor, too, has the memory of the image before.

    Example: `memory.lend(memory.take(100), 80)` is a tensor of 80 floats.
    """

    def __init__(self, *, raise_trim_threshold: bool = False) -> None:
        self._free: list[Floats] = []
        self._raise_trim_threshold = raise_trim_threshold
        if raise_trim_threshold:
            torch.empty(31 << 20, dtype=torch.uint8)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return partial(PatchMemory, raise_trim_threshold=self._raise_trim_threshold), ()

    def take(self, size: int) -> Floats:
        """From `size` to twice as many floats, of any values."""
        with suppress(IndexError):  # none is left
            for _ in range(KEPT):
                memory = self._free.pop(0)
                if size <= len(memory) <= 2 * size:
                    return memory
                if len(memory) > size:
                    self._free.append(memory)
        new: Floats = torch.empty(size).numpy()
        return new

    def lend(self, memory: Floats, size: int) -> Tensor:
        """The first `size` floats as a tensor, float32 `[size]`."""
        part = memory[:size]
        weakref.finalize(part, self._give_back, memory).atexit = False
        return torch.from_numpy(part)

    def _give_back(self, memory: Floats) -> None:
        self._free.append(memory)
        del self._free[:-KEPT]
