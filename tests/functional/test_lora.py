"""Adapters under every layout give the logits of transformers with merged weights, and the gradients of A and B."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vlbridge import read_config
from megatron_vlbridge.weights.adapters import adapter_tensor
from tests import lora_reference, mtp_reference, reference
from tests.closeness import relative_error
from tests.functional import matrix, parity, ranks
from tests.functional.kinds import Variant
from tests.functional.pool import Layout, Pool


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> "Folders":
    return Folders(tmp_path_factory.mktemp("lora"))


class Folders:
    """A tiny checkpoint of each kind, with `mtp` and `tied`, and the same with merged adapters."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def base(self, kind: str, variant: Variant) -> Path:
        folder = self.where / f"{kind}{'-mtp' * variant.mtp}{'-tied' * variant.tied}"
        if not folder.exists():
            write = mtp_reference.write_mtp_checkpoint if variant.mtp else reference.write_checkpoint
            write(folder, tied=variant.tied, **reference.KINDS[kind])
        return folder

    def merged(self, base: Path, pairs: lora_reference.Pairs, targets: object) -> Path:
        folder = self.where / f"{base.name}-{targets}".replace("/", "")
        return folder if folder.exists() else lora_reference.write_merged(base, folder, pairs)


def check(
    pool: Pool,
    folders: Folders,
    kind: str,
    layout: Layout,
    variant: Variant,
    targets: Sequence[str] | None = None,
    vision: bool = True,
    **options: object,
) -> None:
    folder, groups = folders.base(kind, variant), matrix.groups()
    pairs = lora_reference.random_pairs(folder, targets, vision)
    values = {adapter_tensor(name, half): x for name, pair in pairs.items() for half, x in zip("AB", pair, strict=True)}
    settings = {"rank": lora_reference.RANK, "alpha": lora_reference.ALPHA, "targets": targets, "vision": vision}
    packs = [reference.pack(group, parity.PACK_LENGTH) for group in groups]
    results = pool.run(
        ranks.forward_backward,
        layout,
        folder=folder,
        packs=packs,
        lora={**settings, "values": values},
        **{**matrix._options(kind, layout, variant), **options},
    )
    expected = parity.run_reference(folders.merged(folder, pairs, targets), groups)
    bound = parity.tolerance(read_config(folder))
    lengths = [[len(c.tokens) for c in group] for group in groups]
    logits = parity._cut(ranks.of_packs(results, "logits", layout, lengths), lengths)
    assert len(logits) == len(expected.logits)
    for found, wanted in zip(logits, expected.logits, strict=True):
        assert relative_error(found, wanted) < bound
    found = ranks.assemble([r["gradients"] for r in results])
    gradients = lora_reference.adapter_gradients(expected.gradients, pairs)
    assert found.keys() == values.keys()
    errors = {
        adapter_tensor(name, half): relative_error(found[adapter_tensor(name, half)], x)
        for name, both in gradients.items()
        for half, x in zip("AB", both, strict=True)
    }
    assert all(x.any() for both in gradients.values() for x in both)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < bound, f"{worst}: {errors[worst]:.1e}"


PLAIN, UNIFORM = Variant(), Variant("uniform")
BLOCK_MTP, SELECTIVE_MTP = Variant("block", mtp=True, tied=True), Variant("selective", mtp=True)
TP2, TP2_SP = Layout(tp=2, world=2), Layout(tp=2, sp=True, world=2)
TP4, TP4_SP = Layout(tp=4, world=4), Layout(tp=4, sp=True, world=4)
PP2, VPP2, CP2, DP2 = Layout(pp=2, world=2), Layout(pp=2, vpp=2, world=2), Layout(cp=2, world=2), Layout(world=2)
TP2_PP2_CP2 = Layout(tp=2, sp=True, pp=2, cp=2, world=8)
EP2, TP2_ETP2 = Layout(ep=2, world=2), Layout(tp=2, sp=True, etp=2, world=2)
TP2_EP2 = Layout(tp=2, sp=True, ep=2, etp=1, world=2)
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# Without targets: all projections, of the vision tower too.
CASES = [
    ("dense", Layout(), PLAIN, None),
    ("dense", TP2, BLOCK_MTP, None),
    ("dense", TP2_SP, PLAIN, None),
    ("dense", VPP2, UNIFORM, None),
    ("dense", TP2_PP2_CP2, PLAIN, None),
    # More ranks than key-value heads: some ranks have no row of a projection, or no row of any.
    ("dense", TP4_SP, PLAIN, ["v_proj", "up_proj"]),
    ("experts", EP2, PLAIN, None),
    ("experts", TP2_ETP2, UNIFORM, FUSED[:1]),
    ("experts", TP2_EP2, PLAIN, [FUSED[1], "q_proj"]),
    # Rows of the query and of its gate alternate in the weight, and are on different ranks.
    ("linear", TP4, SELECTIVE_MTP, ["q_proj", "in_proj_qkv", "in_proj_b", "mtp.layers.0.mlp.down_proj", "mtp.fc"]),
]
MORE = [
    *(("dense", layout, variant, None) for layout in (PP2, CP2, DP2, TP4) for variant in (PLAIN, BLOCK_MTP)),
    *(("dense", layout, SELECTIVE_MTP, None) for layout in (TP2_SP, VPP2, TP2_PP2_CP2)),
    *(("experts", layout, PLAIN, None) for layout in (Layout(), TP2_ETP2, TP2_EP2, PP2, CP2)),
    *(("experts", layout, BLOCK_MTP, None) for layout in (EP2, Layout(ep=2, cp=2, world=8), TP2_PP2_CP2)),
    *(("linear", layout, UNIFORM, None) for layout in (Layout(), TP2, TP2_SP, TP4_SP, PP2, CP2, TP2_PP2_CP2)),
    *(("linear-experts", layout, BLOCK_MTP, None) for layout in (Layout(), EP2, TP2_ETP2, TP2_EP2, VPP2, CP2)),
]


@pytest.mark.parametrize(
    ("kind", "layout", "variant", "targets"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.layouts) for case in MORE)],
    ids=str,
)
def test_logits_and_gradients_are_those_of_transformers(
    pool: Pool, folder_of: Folders, kind: str, layout: Layout, variant: Variant, targets: list[str] | None
) -> None:
    check(pool, folder_of, kind, layout, variant, targets)
