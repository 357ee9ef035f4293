"""Values stored row-major in a file: any rectangle of them, read directly into a tensor."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Piece, Region, TensorSpec
from megatron_vlbridge.weights.regions import Shape

SPAN_BYTES = 4 * 2**20
# Of one call. Linux puts larger writes into larger folios of the page cache, at several times the CPU time for a byte.
WRITE_BYTES = 256 * 2**10

_CHECKED_AT_ONCE = 2**18  # values, which are held as float64 where some became infinite

Filler = Callable[[Region, torch.Tensor], None]
"""Copies the values of a region into a tensor of its shape, converted to the tensor's dtype."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the values of a tensor are: from byte `start` of `path`, row-major unless `strides` are given."""

    path: Path
    start: int
    spec: TensorSpec
    strides: Shape | None = None

    def read_into(self, offset: Shape, out: torch.Tensor) -> None:
        """Fill `out` with the rectangle of its shape at `offset`, converted to its dtype.

        Holds at most 4 MiB besides. Raises OSError where the file cannot be read or ends too early.
        """
        if out.numel():
            strides = _row_major(self.spec.shape) if self.strides is None else self.strides
            first = sum(index * stride for index, stride in zip(offset, strides, strict=True))
            handle = os.open(self.path, os.O_RDONLY)
            try:
                self._read(handle, first, strides, out)
            finally:
                os.close(handle)

    def _read(self, handle: int, first: int, strides: Shape, out: torch.Tensor) -> None:
        """Halve the rectangle until its values are contiguous, and can be read at once, or lie in a small span."""
        dtype, span = self.spec.dtype, span_of(out.shape, strides)
        pairs = zip(out.shape, out.stride(), strides, strict=True)
        alike = all(size == 1 or here == there for size, here, there in pairs)
        if alike and out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu":
            read_exactly(handle, self.start + first * dtype.itemsize, out)
        elif span * dtype.itemsize <= SPAN_BYTES or out.numel() == 1:
            held = _scratch("read", span * dtype.itemsize).view(dtype)
            read_exactly(handle, self.start + first * dtype.itemsize, held)
            _copy(out, held.as_strided(out.shape, strides))
        else:
            dim = next(dim for dim, size in enumerate(out.shape) if size > 1)
            half = out.shape[dim] // 2
            self._read(handle, first, strides, out.narrow(dim, 0, half))
            rest = out.narrow(dim, half, out.shape[dim] - half)
            self._read(handle, first + half * strides[dim], strides, rest)


def _copy(out: torch.Tensor, values: torch.Tensor) -> None:
    """Copy into a tensor that may be transposed: then in two steps, each of which is five times faster in torch."""
    transposed = out.ndim > 1 and out.stride(-2) == 1 != out.stride(-1) and out.shape[:-2].numel() == 1
    if not (transposed and values.is_contiguous() and out.dtype == values.dtype):
        out.copy_(values)
        return
    rows, columns = out.shape[-2:]
    held = _scratch("transpose", values.nbytes).view(values.dtype).view(columns, rows)
    held.copy_(values.view(rows, columns).t())
    out[(0,) * (out.ndim - 2)].t().copy_(held)


_own = threading.local()


def _scratch(use: str, nbytes: int) -> torch.Tensor:
    """Memory of this thread, overwritten after the next call. Allocating it each time would fragment the heap."""
    if len(getattr(_own, use, b"")) < nbytes:
        setattr(_own, use, bytearray(max(nbytes, SPAN_BYTES)))
    return torch.frombuffer(getattr(_own, use), dtype=torch.uint8, count=nbytes)


def span_of(shape: Shape, strides: Shape) -> int:
    """The elements from the first to the last of a rectangle that is not empty, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _row_major(shape: Shape) -> Shape:
    """The stride of each dim, in elements."""
    return tuple(accumulate(shape[:0:-1], lambda product, size: product * size, initial=1))[::-1] if shape else ()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    # Not view(-1): dims of extent 1 may have any stride, and a single element keeps it.
    return memoryview(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy())


def read_exactly(handle: int, position: int, out: torch.Tensor) -> None:
    """Fill a contiguous tensor from `position` of an open file; OSError where the file ends before."""
    view = as_bytes(out)
    while view:
        count = os.preadv(handle, [view], position)
        if count == 0:
            raise OSError(f"the file ends at byte {position}, {len(view)} bytes too early")
        view, position = view[count:], position + count


def write_exactly(handle: int, position: int, data: memoryview | bytes) -> None:
    """Write all of `data` at `position` of an open file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view[:WRITE_BYTES], position)
        view, position = view[count:], position + count


def split(offset: Shape, out: torch.Tensor, size: int) -> Iterator[tuple[Shape, torch.Tensor]]:
    """Parts of `out`, of at most `size` elements, each with its offset where that of `out` is `offset`."""
    if out.numel() <= size:
        if out.numel():
            yield offset, out
        return
    dim = next(dim for dim, size in enumerate(out.shape) if size > 1)
    half = out.shape[dim] // 2
    yield from split(offset, out.narrow(dim, 0, half), size)
    second = (*offset[:dim], offset[dim] + half, *offset[dim + 1 :])
    yield from split(second, out.narrow(dim, half, out.shape[dim] - half), size)


def gather_into(
    out: torch.Tensor, pieces: Iterable[Piece], fill: Filler, sources: Mapping[str, TensorSpec] | None = None
) -> None:
    """Assemble a region from the other side's pieces, in the dtype of `out`.

    `sources` are the other side's tensors. With them it raises VLBridgeError, naming the tensor, where one has a finite
    value that the dtype of `out` cannot hold.
    """
    for piece in pieces:
        part = piece.place(out)
        fill(piece.source, part)
        if sources is not None and may_overflow(sources[piece.source.name].dtype, out.dtype):
            _check_nothing_overflowed(piece.source, part, fill)


def may_overflow(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a finite value may become infinite in the conversion."""
    return torch.finfo(source).max > torch.finfo(target).max


def _check_nothing_overflowed(region: Region, found: torch.Tensor, fill: Filler) -> None:
    """Reject values that became infinite; they are read once more, as they may have been infinite before."""
    for offset, part in split(region.offset, found, _CHECKED_AT_ONCE):
        low, high = torch.aminmax(part)
        if not (low > -torch.inf and high < torch.inf):  # also where some are NaN
            wide = torch.empty(part.shape, dtype=torch.float64, device=part.device)
            fill(Region(region.name, offset, tuple(part.shape)), wide)
            check_fits(region.name, wide, part.dtype)


def check_fits(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise VLBridgeError, naming the tensor, where a finite value would become infinite in this dtype."""
    for _, part in split((0,) * values.dim(), values, _CHECKED_AT_ONCE):
        lost = part.isfinite() & part.to(dtype).isinf()
        if lost.any():
            raise VLBridgeError(
                f"{name}: expected values that {str(dtype).removeprefix('torch.')} holds (up to "
                f"{torch.finfo(dtype).max:g}), found {part[lost][0].item():g}. Use another dtype."
            )
