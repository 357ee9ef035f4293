"""Selective recomputation: every choice of modules gives the bits of none, and runs its modules a second time.

But for `layernorm` and `shared_experts`, whose input has several gradients in a module that is recomputed: these are
added before the one of what is outside it and not after it. The forward has the same bits too, the gradients differ by
the rounding of additions.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.training.settings import VERIFIED_ITEMS
from tests import reference
from tests.cases import later
from tests.closeness import relative_error
from tests.functional import matrix, ranks
from tests.functional.parity import PACK_LENGTH
from tests.functional.pool import Layout, Pool

DENSE = ("core_attn", "layernorm", "mlp")
EXPERTS = (*DENSE, "moe")
MODULES = {
    "dense": DENSE,
    "dense-mtp": DENSE,
    "experts": EXPERTS,
    "experts-mtp": EXPERTS,
    "mixed": EXPERTS,
    "linear-experts": (*EXPERTS, "shared_experts", "gdn_norm_out"),
}
# Class of a module that is run again -> the name that recomputes it; norms are of several classes.
CLASSES = {"PackedAttention": "core_attn", "MLP": "mlp", "PackRouter": "moe", "SharedExpertMLP": "shared_experts"}
CLASSES |= {"OutputNorm": "gdn_norm_out"}
NORMS = ("RMSNorm", "LayerNorm", "ZeroCenteredRMSNorm")
REORDERED, ROUNDING = {"layernorm", "shared_experts"}, 2e-6
LOSSES = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.05}

TP2, PP2, CP2 = Layout(tp=2, sp=True, world=2), Layout(pp=2, world=2), Layout(cp=2, world=2)
VPP2, ALL = Layout(pp=2, vpp=2, world=2), Layout(tp=2, sp=True, pp=2, cp=2, world=8)
EP2 = Layout(tp=2, sp=True, ep=2, etp=1, world=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("recompute")
    folders = {
        f"{kind}{'-mtp' * mtp}": folder
        for (kind, mtp, tied), folder in matrix.write_folders(where, ("dense", "experts", "linear-experts")).items()
        if not tied
    }
    folders["mixed"] = reference.write_checkpoint(where / "mixed", experts={"mlp_only_layers": [1]})
    return folders


def run_counted(
    layout: Layout, folder: Path, packs: Sequence[Mapping[str, torch.Tensor]], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """`forward_backward` with each of these options, and how often the modules of each class ran."""
    results = []
    for options in runs:
        calls: Counter[str] = Counter()
        hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_, n=calls: n.update([type(m).__name__]))
        try:
            results.append(ranks.forward_backward(layout, folder, packs, **options) | {"calls": calls})
        finally:
            hook.remove()
    return results


def again(plain: Counter[str], found: Counter[str]) -> dict[str, int]:
    """How many more calls there were of each module that can be recomputed."""
    counts = {name: found[key] - plain[key] for key, name in CLASSES.items()}
    counts["layernorm"] = sum(found[key] - plain[key] for key in NORMS)
    return {name: count for name, count in counts.items() if count}


def check_bits(found: dict[str, Any], plain: dict[str, Any], bound: float = 0.0) -> None:
    """The same bits; of gradients at most this relative error."""
    for key in ("logits", "losses", "reports"):
        assert all(map(torch.equal, found[key], plain[key])), key
    assert len(found["gradients"]) == len(plain["gradients"])
    for mine, theirs in zip(found["gradients"], plain["gradients"], strict=True):
        assert mine[:2] == theirs[:2]
        assert torch.equal(mine[2], theirs[2]) or relative_error(mine[2], theirs[2]) < bound, mine[0]


def compare(
    pool: Pool, folder: Path, layout: Layout, choices: Sequence[Sequence[str]], **options: Any
) -> Iterator[tuple[Sequence[str], dict[str, int]]]:
    """Run these choices; gives each with what ran again on all ranks."""
    selective = {"recompute_granularity": "selective"}
    if read_config(folder).text.moe and not read_config(folder).text.num_mtp_layers:
        options |= LOSSES
    runs = [options, *(options | selective | {"recompute_modules": list(modules)} for modules in choices)]
    packs = [reference.pack(group, PACK_LENGTH) for group in matrix.groups()]
    by_rank = pool.run(run_counted, layout, folder=folder, packs=packs, runs=runs)
    for index, modules in enumerate(choices, 1):
        total: Counter[str] = Counter()
        for results in by_rank:
            check_bits(results[index], results[0], 0.0 if REORDERED.isdisjoint(modules) else ROUNDING)
            total.update(again(results[0]["calls"], results[index]["calls"]))
        yield modules, dict(total)


def expected_calls(folder: Path, modules: Sequence[str]) -> dict[str, int]:
    """Of the whole model on one process, four packs: tower and decoder layers, and an MTP layer."""
    config = read_config(folder)
    kinds = [*config.text.layer_kinds, *[config.text.mtp_layer_kind] * config.text.num_mtp_layers]
    tower, layers = config.vision.depth, len(kinds)
    sparse, linear = sum(kind.experts for kind in kinds), sum(kind.linear_attention for kind in kinds)
    shared = config.text.moe is not None and bool(config.text.moe.shared_expert_intermediate_size)
    counts = {
        "core_attn": tower + layers - linear,
        "layernorm": 2 * (tower + layers),
        # Not those of the tower; each of the experts is one.
        "mlp": layers - sparse if "mlp" in modules else 0,
        "moe": sparse,
        # Once within the layer that is recomputed, and there once more by itself.
        "shared_experts": shared * sparse * (("moe" in modules) + ("shared_experts" in modules)),
        "gdn_norm_out": linear,
    }
    if config.text.moe is not None and "moe" in modules:
        counts["mlp"] += config.text.moe.num_experts * sparse
    within = {"mlp", "shared_experts"} if "moe" in modules else set()
    return {name: 4 * count for name, count in counts.items() if count and name in within.union(modules)}


def test_every_verified_module_is_tested() -> None:
    tested = {name for names in MODULES.values() for name in names}
    assert tested == set(VERIFIED_ITEMS["recompute_modules"])


def choices(kind: str) -> list[tuple[str, ...]]:
    """Each module alone, every pair, and all."""
    names = MODULES[kind]
    return [*combinations(names, 1), *combinations(names, 2), names]


@pytest.mark.parametrize("kind", ["dense", "linear-experts"])
def test_each_module_alone_and_all_together_give_the_same_bits(pool: Pool, folders: dict[str, Path], kind: str) -> None:
    names = MODULES[kind]
    for modules, calls in compare(pool, folders[kind], Layout(), [*combinations(names, 1), names]):
        assert calls == expected_calls(folders[kind], modules), modules


@pytest.mark.layouts
@pytest.mark.parametrize("kind", MODULES)
def test_every_pair_of_modules_gives_the_same_bits(pool: Pool, folders: dict[str, Path], kind: str) -> None:
    for modules, calls in compare(pool, folders[kind], Layout(), choices(kind)):
        assert calls == expected_calls(folders[kind], modules), modules


SPREAD = [(kind, layout) for kind in ("dense-mtp", "experts-mtp", "linear-experts") for layout in (TP2, PP2, CP2, ALL)]
SPREAD += [("linear-experts", layout) for layout in (VPP2, EP2, Layout(ep=2, world=2))]


@pytest.mark.parametrize(("kind", "layout"), [("dense", VPP2), *(later(*row) for row in SPREAD)], ids=str)
def test_a_layout_gives_the_same_bits(pool: Pool, folders: dict[str, Path], kind: str, layout: Layout) -> None:
    """With all modules at once."""
    for modules, calls in compare(pool, folders[kind], layout, [MODULES[kind]]):
        assert set(calls) == set(expected_calls(folders[kind], modules))


@pytest.mark.parametrize("kind", ["dense", "linear-experts"])
def test_a_bf16_model_gives_the_same_bits(pool: Pool, folders: dict[str, Path], kind: str) -> None:
    bf16 = {"params_dtype": torch.bfloat16, "bf16": True}
    names = [name for name in MODULES[kind] if name not in REORDERED]
    for modules, calls in compare(pool, folders[kind], Layout(), [names], **bf16):
        assert calls == expected_calls(folders[kind], modules)
