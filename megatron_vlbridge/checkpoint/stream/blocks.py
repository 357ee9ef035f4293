"""Regions cut into blocks of bounded size."""

from collections.abc import Iterator

from megatron_vlbridge.weights import Region

BLOCK_BYTES = 64 * 2**20


def row_blocks(region: Region, itemsize: int, block_bytes: int = BLOCK_BYTES, dim: int = 0) -> Iterator[Region]:
    """Cut a region along one dim into blocks of at most `block_bytes`, or of one index where one is larger already."""
    if not region.volume:
        return
    rows = region.shape[dim] if region.shape else 0
    if not rows:
        yield region
        return
    step = max(1, block_bytes // (region.volume // rows * itemsize))
    for start in range(0, rows, step):
        offset, shape = list(region.offset), list(region.shape)
        offset[dim] += start
        shape[dim] = min(step, rows - start)
        yield Region(region.name, tuple(offset), tuple(shape))
