"""Every layout that is offered, as one table: each row is run and compared with transformers.

A row is a parallel layout; it is run with each variant of what does not change the ranks. The guards of
`megatron_vlbridge.training.guards` admit exactly the combinations of dimensions of these rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tests import reference
from tests.functional import ranks
from tests.functional.kinds import KINDS, Variant
from tests.functional.parity import PACK_LENGTH, Errors, compare
from tests.functional.pool import Layout, Pool
from tests.mtp_reference import write_mtp_checkpoint

_PIPELINES: tuple[dict[str, Any], ...] = ({}, {"pp": 2}, {"pp": 2, "vpp": 2})
_CONTEXTS: tuple[dict[str, Any], ...] = ({}, {"cp": 2})


def layouts(kind: str) -> list[Layout]:
    """The rows of this kind of model: the whole product of dimensions, then other sizes."""
    rows = [
        Layout(**parts, world=_world(parts))
        for tensor, pipeline, context in product(KINDS[kind].tensors, _PIPELINES, _CONTEXTS)
        for parts in [tensor | pipeline | context]
    ]
    return rows + list(KINDS[kind].others)


_TWO = (Variant(), Variant("block", mtp=True, tied=True))


def variants(kind: str, layout: Layout) -> list[Variant]:
    """The variants that are run within a layout; a padded batch is offered where context parallelism does not cut it.

    On more than two processes half of them, which hold every pair of recomputation, multi-token prediction and tied
    embeddings. Where not every variant is run, a layout has two, and those that `make test` runs.
    """
    if not KINDS[kind].every_variant:
        return list(dict.fromkeys([*_TWO, *(variant for row, variant in KINDS[kind].small if row == layout)]))
    packs = [
        Variant(recompute, mtp, tied)
        for recompute, mtp, tied in product(("", "uniform", "selective"), (False, True), (False, True))
    ]
    if any(layout in kind.others for kind in KINDS.values()):
        return [*_TWO, *[Variant(padded=True)] * (layout.cp == 1)]
    if layout.world > 2:
        packs = [v for v in packs if (v.mtp == v.tied) != (v.recompute == "uniform")]
    if layout.cp > 1:
        return packs
    return [*packs, Variant(padded=True), Variant("block", mtp=True, tied=True, padded=True)]


def write_folders(where: Path, kinds: Iterable[str]) -> dict[tuple[str, bool, bool], Path]:
    """A tiny checkpoint of each of these kinds, with and without multi-token prediction and tied embeddings."""
    folders = {}
    for kind, mtp, tied in product(kinds, (False, True), (False, True)):
        write = write_mtp_checkpoint if mtp else reference.write_checkpoint
        folder = where / f"{kind}{'-mtp' * mtp}{'-tied' * tied}"
        folders[kind, mtp, tied] = write(folder, tied=tied, **reference.KINDS[kind])
    return folders


def dimensions(layout: Layout, variant: Variant) -> set[str]:
    """What a run combines: the parallel dimensions above one, and what its variant does."""
    parallel = {name for name in ("tp", "pp", "vpp", "cp", "ep", "dp") if getattr(layout, name) > 1}
    parallel |= ({"sp"} if layout.sp else set()) | ({"etp"} if (layout.etp or 1) > 1 else set())
    return parallel | {name for name in ("recompute", "mtp", "tied", "padded") if getattr(variant, name)}


def run(
    pool: Pool,
    kind: str,
    layout: Layout,
    chosen: Sequence[Variant],
    folders: Mapping[tuple[str, bool, bool], Path],
    **settings: Any,
) -> list[Errors]:
    """How far each variant under `layout`, with these settings of Megatron's config, is from transformers."""
    packed = [reference.pack(group, PACK_LENGTH) for group in groups()]
    padded = [reference.padded_batch(group) for group in groups()]
    runs = [
        (folders[kind, v.mtp, v.tied], padded if v.padded else packed, {**_options(kind, layout, v), **settings})
        for v in chosen
    ]
    by_rank = pool.run(ranks.run_variants, layout, runs=runs)
    return [
        compare(results, layout, folder, groups())
        for (folder, _, _), results in zip(runs, zip(*by_rank, strict=True), strict=True)
    ]


def _options(kind: str, layout: Layout, variant: Variant) -> Mapping[str, Any]:
    options = dict(variant.overrides)
    if variant.padded:
        # Padded batches differ in length from each other.
        options |= {"variable_seq_lengths": layout.pp > 1, "moe_token_dispatcher_type": "alltoall"}
    elif KINDS[kind].experts and variant.tied and layout.vpp == 1 and layout.pp < 4 and not layout.stages:
        # Megatron's default, where no deepstack features travel; all other rows run the all-to-all.
        options |= {"moe_token_dispatcher_type": "allgather", "seq_length": PACK_LENGTH}
    if variant.mtp and layout.stages:
        options["pipeline_model_parallel_layout"] = layout.stages.replace("L", "mL")
    return options


def groups() -> list[list[reference.Conversation]]:
    """Four packs, with images, videos and text, among them one of text alone."""
    return [
        [reference.conversation(kind, seed) for kind, seed in (("mixed", 2), ("text", 3), ("image", 4))],
        [reference.conversation(kind, seed) for kind, seed in (("text", 5),)],
        [reference.conversation(kind, seed) for kind, seed in (("images", 6), ("video", 7))],
        [reference.conversation(kind, seed) for kind, seed in (("image", 8), ("video", 9), ("text", 10))],
    ]


def _world(parts: Mapping[str, Any]) -> int:
    ranks = parts.get("tp", 1) * parts.get("cp", 1)
    experts = parts.get("ep", 1) * parts.get("etp", 1)
    return parts.get("pp", 1) * max(ranks, experts)
