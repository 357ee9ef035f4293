"""Adapters out of live models and back: folders of peft, Megatron's checkpoints, and the weights beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge.weights.adapters import adapter_tensor
from tests import lora_reference, reference
from tests.closeness import relative_error
from tests.functional import lora_ranks, matrix, ranks
from tests.functional.kinds import Variant
from tests.functional.pool import Layout, Pool

ONE, VPP2 = Layout(), Layout(pp=2, vpp=2, world=2)
TP2_SP, TP4_SP = Layout(tp=2, sp=True, world=2), Layout(tp=4, sp=True, world=4)
TP2_EP2 = Layout(tp=2, sp=True, ep=2, etp=1, world=2)
ETP2_PP2 = Layout(tp=2, sp=True, pp=2, etp=2, world=4)
SETTINGS: dict[str, Any] = {"rank": lora_reference.RANK, "alpha": lora_reference.ALPHA, "vision": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("lora")
    return {kind: reference.write_checkpoint(made / kind, **options) for kind, options in reference.KINDS.items()}


def values_of(pairs: lora_reference.Pairs) -> dict[str, torch.Tensor]:
    return {adapter_tensor(name, half): x for name, pair in pairs.items() for half, x in zip("AB", pair, strict=True)}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def in_peft(pairs: lora_reference.Pairs) -> dict[str, torch.Tensor]:
    """The tensors as peft names and shapes them, element by element."""
    found = {}
    for weight, (a, b) in pairs.items():
        module = weight.removesuffix(".weight")
        if weight.endswith(".weight"):
            expected = {"A": a, "B": b}
        else:
            module = module.removesuffix(".down_proj").replace("gate_up_proj", "base_layer")
            experts, rank, columns = a.shape
            expected = {"A": torch.empty(experts * rank, columns), "B": torch.empty(b.shape[1], rank * experts)}
            for e in range(experts):
                for r in range(rank):
                    expected["A"][e * rank + r] = a[e, r]
                    expected["B"][:, r * experts + e] = b[e, :, r]
        found |= {f"base_model.model.{module}.lora_{half}.weight": x for half, x in expected.items()}
    return found


CASES = [
    ("dense", TP2_SP, VPP2),
    ("experts", TP2_EP2, ONE),
    ("linear", TP4_SP, ONE),
    pytest.param("linear-experts", ETP2_PP2, TP2_EP2, marks=pytest.mark.layouts),
    pytest.param("experts", ONE, ETP2_PP2, marks=pytest.mark.layouts),
    pytest.param("linear", ONE, TP4_SP, marks=pytest.mark.layouts),
]


@pytest.mark.parametrize(("kind", "layout", "other"), CASES, ids=str)
def test_adapters_come_out_and_go_back_in_bit_for_bit(
    pool: Pool, folders: dict[str, Path], tmp_path: Path, kind: str, layout: Layout, other: Layout
) -> None:
    folder, pairs = folders[kind], lora_reference.random_pairs(folders[kind], vision=True)
    values, expected = values_of(pairs), in_peft(pairs)
    # Projections that Megatron has in one layer need not have the same A.
    assert not torch.equal(*(next(a for n, (a, _) in pairs.items() if end in n) for end in ("q_proj", "k_proj")))
    target, saved = tmp_path / "peft", tmp_path / "saved"
    lora = {**SETTINGS, "values": values}
    results = pool.run(lora_ranks.out, layout, folder=folder, lora=lora, target=target, saved=saved)
    for rank, result in enumerate(results):
        base, before = dict(result["base"]), weights_of(folder)
        # Experts that the file has the other way around.
        turned = {name: x for name, x in before.items() if base[name].shape != x.shape}
        assert_same(base, before | {name: x.transpose(1, 2) for name, x in turned.items()})
        assert_same(dict(result["all"]), expected)
        assert [name for name, _ in result["all"]] == [name for name, _ in results[0]["all"]]
        assert_same(dict(result["first"]), {} if rank else expected)
        assert result["trained"]
        assert all("_lora." in name for name in result["trained"])
    assert_same(load_file(target / "adapter_model.safetensors"), expected)
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (lora_reference.RANK, lora_reference.ALPHA)
    again = pool.run(lora_ranks.back, other, folder=folder, settings=SETTINGS, target=target, saved=saved)
    assert all("is in only one of both" in result["refused"] for result in again)
    for source in ("peft", "saved"):
        assert_same(ranks.assemble([result[source] for result in again]), values)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


def test_weights_pass_adapters_of_others_by(pool: Pool, folders: dict[str, Path]) -> None:
    for result in pool.run(lora_ranks.foreign, TP2_SP, folder=folders["dense"]):
        assert_same(dict(result), weights_of(folders["dense"]))


def test_a_training_starts_with_the_same_adapters_in_every_layout(pool: Pool, folders: dict[str, Path]) -> None:
    starts = [
        ranks.assemble(pool.run(lora_ranks.start, layout, folder=folders["experts"], settings=SETTINGS))
        for layout in (ONE, TP2_EP2)
    ]
    assert_same(starts[1], starts[0])
    for name, x in starts[0].items():
        assert x.any() == name.endswith("A"), name
        bound = x.shape[-1] ** -0.5
        if name.endswith("A"):
            assert 0.8 * bound < x.abs().max() < bound
            assert x.flatten(1).unique(dim=0).shape[0] == x.shape[0], f"{name}: some experts start alike"
    (other,) = pool.run(lora_ranks.start, ONE, folder=folders["experts"], settings={**SETTINGS, "seed": 1})
    assert not torch.equal(ranks.assemble([other])[name.replace("lora_B", "lora_A")], starts[0][name[:-1] + "A"])


@pytest.mark.parametrize("layout", [TP2_SP, Layout(tp=2, world=2)], ids=str)
def test_dropout_has_the_mean_of_the_output_without_and_masks_that_fit_the_ranks(
    pool: Pool, folders: dict[str, Path], layout: Layout
) -> None:
    settings = {"rank": 2, "alpha": 4.0, "dropout": 0.25}
    results = pool.run(lora_ranks.drop, layout, folder=folders["dense"], settings=settings, count=300)
    for name in ("column", "row"):
        for result in results:
            dropped, whole = result[name]["dropped"], result[name]["whole"]
            assert relative_error(dropped.mean(0), whole) < 0.02
            assert len(dropped.flatten(1).unique(dim=0)) > 250
    for name in ("column", "row"):
        # Both ranks have the same input only of a column-parallel layer without sequence parallelism.
        same = name == "column" and not layout.sp
        assert torch.equal(results[0][name]["input"], results[1][name]["input"]) == same
        # The rows of B are filled alike, so the outputs of the ranks are the same.
        assert name == "row" or torch.equal(results[0][name]["dropped"], results[1][name]["dropped"])


@pytest.mark.parametrize("layout", [TP2_SP, pytest.param(Layout(tp=2, world=2), marks=pytest.mark.layouts)], ids=str)
def test_recomputation_draws_the_same_dropout(pool: Pool, folders: dict[str, Path], layout: Layout) -> None:
    pairs = lora_reference.random_pairs(folders["dense"])
    lora = {"rank": lora_reference.RANK, "alpha": lora_reference.ALPHA, "values": values_of(pairs)}
    packs = [reference.pack(group, 128) for group in matrix.groups()]
    gradients = {}
    for name, dropout, variant in (("none", 0.0, ""), ("plain", 0.3, ""), ("recomputed", 0.3, "uniform")):
        options = {"lora": {**lora, "dropout": dropout}, **Variant(variant).overrides}
        results = pool.run(ranks.forward_backward, layout, folder=folders["dense"], packs=packs, **options)
        gradients[name] = ranks.assemble([result["gradients"] for result in results])
    for name, x in gradients["plain"].items():
        assert relative_error(gradients["recomputed"][name], x) < 1e-6
        assert relative_error(gradients["none"][name], x) > 0.01


def test_an_adapter_that_the_dtype_of_the_model_cannot_hold_is_refused_on_all_ranks(
    pool: Pool, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"rank": 3, "alpha": 6.0, "targets": ["q_proj", "o_proj"]}
    pool.run(lora_ranks.save, ONE, folder=folders["dense"], settings=settings, target=tmp_path / "fits")
    path = shutil.copytree(tmp_path / "fits", tmp_path / "large") / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if "layers.0.self_attn.o_proj.lora_A" in name)
    tensors[name][:, -1] = 1e5  # on the last tensor-parallel rank
    save_file(tensors, path)
    calls = [("load", tmp_path / name) for name in ("fits", "large")]
    found = {"folder": folders["dense"], "settings": settings, "calls": calls}
    for dtype, words in ((torch.float16, "o_proj.weight: expected values that float16 holds"), (torch.bfloat16, "")):
        for fits, large in pool.run(lora_ranks.refusals, TP2_SP, **found, params_dtype=dtype):
            assert fits == "accepted"
            assert words in large if words else large == "accepted"


def test_what_does_not_fit_is_refused_on_all_ranks(pool: Pool, folders: dict[str, Path], tmp_path: Path) -> None:
    folder, settings = folders["dense"], {"rank": 3, "alpha": 6.0, "targets": ["q_proj", "v_proj"]}
    made = {}
    for name, change in {
        "same": {},
        "rank": {"rank": 2, "alpha": 4.0},
        "scaling": {"alpha": 3.0},
        "targets": {"targets": ["q_proj"]},
    }.items():
        made[name] = tmp_path / name
        pool.run(lora_ranks.save, ONE, folder=folder, settings={**settings, **change}, target=made[name])
    for name, alpha in (("rslora", 2 * 3**0.5), ("zero", 0)):
        made[name] = shutil.copytree(made["same"], tmp_path / name)
        config = json.loads((made[name] / "adapter_config.json").read_text())
        changed = config | {"lora_alpha": alpha, "use_rslora": True}
        (made[name] / "adapter_config.json").write_text(json.dumps(changed))
    made["base"] = tmp_path / "base"
    other = {**settings, "targets": ["q_proj"]}
    pool.run(lora_ranks.save, ONE, folder=folders["linear"], settings=other, target=made["base"])
    calls = [
        *(("load", made[name]) for name in ("same", "rslora", "rank", "scaling", "zero", "targets", "base")),
        ("load", tmp_path / "none"),
        ("add", {**settings, "targets": ["proj"]}),
        ("add", {**settings, "targets": ["proj"], "vision": True}),
        ("add", {**settings, "rank": 0}),
    ]
    results = pool.run(lora_ranks.refusals, VPP2, folder=folder, settings=settings, calls=calls)
    words = [
        ["accepted"],
        ["accepted"],
        ["expected rank 3 and scaling 2", "found 2 and 2", "rank=2, alpha=4"],
        ["expected rank 3 and scaling 2", "found 3 and 1", "rank=3, alpha=3"],
        ["expected rank 3 and scaling 2", "found 3 and 0. Merge"],
        ["adapters of the 8 weights", "found 4", "layers.0.self_attn.v_proj.weight", "targets"],
        ["q_proj", "expected"],
        ["none: expected a local folder of peft"],
        ["'proj'", "found none, but model.visual.", "--lora-vision"],
        ["'proj'", "model.visual.patch_embed.proj"],
        ["LoRA rank: expected an integer of at least 1, found 0"],
    ]
    for result in results:
        for text, expected in zip(result, words, strict=True):
            assert all(word in text for word in expected), text
