"""The values that an adapter adds to the weights of its base, in the arithmetic of `peft`'s `merge_and_unload`."""

from collections.abc import Iterator, Mapping

import torch

from megatron_vlbridge.checkpoint.peft.adapter import LoraPair
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Region, RuleTable

# Rows of a product at once; the last have up to twice as many, since BLAS rounds products of few rows otherwise.
_ROWS = 64


class Delta:
    """Adds `scaling * B A` to regions of the base's tensors.

    `table` has the base's own form of experts, `fused` that of `pairs`. B A is a product in float32 (float64 where the
    weight is), and the sum is rounded once to the dtype of the weight. Of experts and other `target_parameters` B A is
    rounded to it before, too (peft 0.21, `Linear.get_delta_weight` and `ParamWrapper.get_delta_weight`).
    """

    def __init__(self, pairs: Mapping[str, LoraPair], table: RuleTable, fused: RuleTable) -> None:
        self._pairs, self._table, self._fused = pairs, table, fused

    @property
    def scratch_bytes(self) -> int:
        """The most memory that `add_into` takes: A, B and some rows of their product."""
        return max(map(_scratch_bytes, self._pairs.values()))

    def add_into(self, region: Region, out: torch.Tensor) -> None:
        """Add to `out`, the values of a region of the base.

        Raises VLBridgeError, naming the weight, for a sum that is not finite.
        """
        for weight, values in self._parts(region, out):
            pair = self._pairs[weight.name]
            if pair.experts is None:
                _add(pair, weight, values, None)
                continue
            for index, expert in enumerate(range(weight.offset[0], weight.end[0])):
                _add(pair, weight, values[index], expert)

    def _parts(self, region: Region, out: torch.Tensor) -> Iterator[tuple[Region, torch.Tensor]]:
        """The regions of weights with an adapter in a region of the base, and where in `out` they are."""
        pair = self._pairs.get(region.name)
        if pair is not None and pair.experts is None:
            yield region, out
            return
        for piece in self._table.megatron_sources(region):
            for inner in self._fused.hf_sources(piece.source):
                if inner.source.name in self._pairs:
                    yield inner.source, inner.place(piece.place(out))


def _scratch_bytes(pair: LoraPair) -> int:
    (rank, columns), rows = pair.a.spec.shape[-2:], pair.b.spec.shape[-2]
    return 8 * (rank * (rows + columns) + 2 * _ROWS * columns)


def _add(pair: LoraPair, weight: Region, out: torch.Tensor, expert: int | None) -> None:
    """Add to some rows and columns of a weight, of one expert where it has experts."""
    (first, start), (last, end) = weight.offset[-2:], weight.end[-2:]
    a, b = pair.read(expert, torch.promote_types(out.dtype, torch.float32))
    for top, bottom in _tiles(b.shape[0]):
        low, high = max(first, top), min(last, bottom)
        if low < high:
            delta = (b[top:bottom] @ a * pair.scaling)[low - top : high - top, start:end]
            rows = out[low - first : high - first]
            rows += delta.to(out.dtype) if pair.parameter else delta
            _check_finite(weight.name, rows)


def _tiles(rows: int) -> Iterator[tuple[int, int]]:
    """The first and last row of each product, the same whichever rows are wanted."""
    count = max(1, rows // _ROWS)
    for index in range(count):
        yield index * _ROWS, rows if index == count - 1 else (index + 1) * _ROWS


def _check_finite(name: str, values: torch.Tensor) -> None:
    if not values.isfinite().all():
        found = values[~values.isfinite()][0].item()
        raise VLBridgeError(
            f"{name}: expected merged values that {str(values.dtype).removeprefix('torch.')} holds, found {found}: the "
            "base or the adapter has such a value, or their sum is too large. Check both, or merge into a base of "
            "another dtype."
        )
