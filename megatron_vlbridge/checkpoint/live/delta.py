"""Which weights of a live model have changed since they were exported."""

import torch

from megatron_vlbridge.checkpoint.live.collectives import gather
from megatron_vlbridge.checkpoint.live.weights import LiveWeights
from megatron_vlbridge.checkpoint.stream.digest import Digest, Hasher
from megatron_vlbridge.checkpoint.stream.raw import as_bytes, split
from megatron_vlbridge.weights import Region, RuleTable
from megatron_vlbridge.weights.regions import RegionIndex

_AT_ONCE = 2**24  # elements that are copied to the host


class WeightDigests:
    """What `export_hf_weights(digests=...)` has sent, so that the next export sends only what has changed since.

    Each rank keeps a BLAKE3 digest of every shard that it holds, which it computes on the host before an export. Use
    one object on each rank for all exports to the same receivers; the first export sends everything. So does one with
    other options, in another layout, and after one that was not taken to its end on every rank. `unchanged` are the
    names that the last export left out, the same on all ranks; in FP8 the scales of a weight are left out with it.

    Example: with `digests = WeightDigests()`, `for name, tensor in export_hf_weights(model, digests=digests): ...`
    after each training step.
    """

    def __init__(self) -> None:
        self.unchanged: tuple[str, ...] = ()
        self._digests: dict[Region, Digest] = {}
        self._options: object = None
        self._complete = False

    def compare(self, weights: LiveWeights, rules: RuleTable, options: object) -> set[str]:
        """The Hugging Face tensors to be sent. Collective; `options` are those of the export."""
        found: dict[Region, Digest] = {}

        def note(region: Region, values: torch.Tensor) -> None:
            found[region] = _digest(values)

        weights.visit(note)
        usable = self._complete and options == self._options
        mine = [region for region, digest in found.items() if self._digests.get(region) != digest]
        self._digests, self._options, self._complete = found, options, False
        everyone: list[tuple[bool, list[Region]]] = gather((usable, mine))
        names = set(rules.hf_shapes)
        if all(usable for usable, _ in everyone):
            changed = RegionIndex((region, region, False) for _, regions in everyone for region in regions)
            names = {name for name in names if _has_any(changed, rules, name)}
        self.unchanged = tuple(name for name in rules.hf_shapes if name not in names)
        return names

    def complete(self) -> None:
        """Note that this rank has handed over all that it received."""
        self._complete = True


def _has_any(changed: RegionIndex, rules: RuleTable, name: str) -> bool:
    """Whether some value of a tensor comes from one of these regions."""
    pieces = rules.megatron_sources(Region.whole(name, rules.hf_shapes[name]))
    return any(changed.pieces(piece.source) for piece in pieces)


def _digest(values: torch.Tensor) -> Digest:
    hasher = Hasher()
    for _, part in split((0,) * values.dim(), values, _AT_ONCE):
        hasher.update(as_bytes(part.contiguous().cpu()))
    return hasher.digest
