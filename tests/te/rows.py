"""The layouts in which the TE backend is compared with transformers, each in one variant.

They hold every pair of what the CPU backend's rows combine (tests/functional/matrix.py), every exchange between
context-parallel ranks, and settings of Megatron's that change what its modules of Transformer Engine do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.functional.kinds import KINDS, Variant
from tests.functional.parity import Errors
from tests.functional.pool import Layout, Pool


@dataclass(frozen=True)
class Row:
    """A layout, its variant, and settings of Megatron's config beside them.

    `make test-te` leaves out the rows that are `further`: the others hold every pair and setting of
    Qwen3-VL without them.
    """

    kind: str
    layout: Layout
    variant: Variant = field(default_factory=Variant)
    settings: Mapping[str, Any] = field(default_factory=dict)
    further: bool = False

    def __str__(self) -> str:
        names = [self.kind, str(self.layout), str(self.variant).replace(" ", "-"), self.setting]
        return "-".join(name for name in names if name)

    @property
    def setting(self) -> str:
        """The settings for a person."""
        return ", ".join(
            " ".join(value) if isinstance(value, list) else value if isinstance(value, str) else name
            for name, value in self.settings.items()
        )


def exchange(*names: str) -> Mapping[str, Any]:
    """`cp_comm_type`: one for all layers, or one for each."""
    return {"cp_comm_type": names[0] if len(names) == 1 else list(names)}


def _rows_of_small_sets(kind: str, fewer: tuple[int, ...]) -> Iterator[Row]:
    """What `make test` runs of this kind on the CPU backend; of these, by their indexes, `make test-te`."""
    for index, (layout, variant) in enumerate(KINDS[kind].small):
        yield Row(kind, layout, variant, further=index not in fewer)


ROWS: tuple[Row, ...] = (
    Row("dense", Layout(), further=True),
    Row("dense", Layout(), Variant("selective", mtp=True, tied=True), further=True),
    Row("dense", Layout(), Variant(padded=True), {"bias_dropout_fusion": True}),
    Row("dense", Layout(world=2), Variant("uniform", mtp=True, tied=True)),
    Row("dense", Layout(tp=2, world=2), Variant("selective", padded=True)),
    Row("dense", Layout(tp=2, sp=True, world=2), Variant("uniform")),
    Row("dense", Layout(tp=2, sp=True, world=2), Variant(mtp=True, tied=True, padded=True)),
    Row("dense", Layout(pp=2, world=2), Variant("uniform", mtp=True, tied=True, padded=True), further=True),
    Row("dense", Layout(pp=2, vpp=2, world=2), Variant("selective", mtp=True, tied=True)),
    Row("dense", Layout(cp=2, world=2), Variant(), exchange("p2p"), further=True),
    Row("dense", Layout(cp=2, world=2), Variant(mtp=True, tied=True), exchange("a2a")),
    Row("dense", Layout(cp=2, world=2), Variant("uniform", mtp=True), exchange("all_gather"), further=True),
    Row("dense", Layout(cp=2, world=2), Variant(), exchange("p2p", "a2a", "all_gather", "p2p")),
    Row("dense", Layout(cp=4, world=4), Variant(), exchange("p2p")),
    Row("dense", Layout(cp=4, world=4), Variant("selective"), exchange("all_gather"), further=True),
    Row("dense", Layout(tp=2, sp=True, cp=2, world=4), Variant("uniform", mtp=True), further=True),
    Row("dense", Layout(tp=2, sp=True, cp=2, world=4), Variant(), exchange("all_gather")),
    Row("dense", Layout(tp=2, sp=True, pp=2, vpp=2, world=4)),
    Row("dense", Layout(pp=2, vpp=2, cp=2, world=4), Variant("selective", tied=True)),
    Row("dense", Layout(pp=2, vpp=2, world=4), Variant(padded=True)),
    Row("dense", Layout(tp=2, sp=True, world=4)),
    Row("dense", Layout(cp=2, world=4)),
    Row("experts", Layout(), Variant("uniform"), further=True),
    Row("experts", Layout(ep=2, world=2), Variant(mtp=True, tied=True), further=True),
    Row("experts", Layout(tp=2, sp=True, etp=2, world=2), Variant("selective", mtp=True)),
    Row("experts", Layout(tp=2, sp=True, ep=2, etp=1, world=2), Variant("uniform", tied=True), further=True),
    Row("experts", Layout(tp=2, sp=True, ep=2, etp=2, world=4), Variant(padded=True)),
    Row("experts", Layout(cp=2, ep=2, world=2), Variant("uniform", mtp=True, tied=True)),
    Row("experts", Layout(pp=2, vpp=2, ep=2, world=4), Variant("block", mtp=True, tied=True, padded=True)),
    Row("experts", Layout(tp=2, sp=True, etp=2, pp=2, vpp=2, world=4), Variant("uniform", tied=True)),
    Row("experts", Layout(pp=2, vpp=2, cp=2, ep=2, world=4), Variant(mtp=True)),
    Row("experts", Layout(tp=2, sp=True, etp=2, cp=2, world=4), Variant("selective"), exchange("all_gather")),
    Row("experts", Layout(cp=2, ep=2, world=4)),
    *_rows_of_small_sets("linear", (1, 4, 6)),
    *_rows_of_small_sets("linear-experts", (1, 5)),
)


def measure(pool: Pool, row: Row, folders: Mapping[tuple[str, bool, bool], Path]) -> Errors:
    """How far it is from transformers."""
    from tests.functional import matrix

    (errors,) = matrix.run(pool, row.kind, row.layout, [row.variant], folders, **row.settings)
    return errors
