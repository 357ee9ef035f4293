"""The router's losses: gradients equal a plain formula on transformers' router logits, whatever padding and layout."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertLayout
from tests import reference
from tests.functional import matrix, ranks
from tests.functional.cases import later
from tests.functional.parity import PACK_LENGTH, TOLERANCE, tolerance
from tests.functional.pool import Layout, Pool

AUX, Z = 0.5, 0.05
RECOMPUTED: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ALL_BUT_CP = Layout(tp=2, sp=True, pp=2, ep=2, etp=1, world=4)
SMALL = (
    Layout(),
    Layout(world=2),
    Layout(tp=2, sp=True, etp=2, world=2),
    Layout(cp=2, world=2),
    Layout(pp=2, world=2),
    Layout(ep=2, world=2),
    Layout(pp=2, vpp=2, world=2),
    ALL_BUT_CP,
    Layout(tp=2, sp=True, cp=2, ep=2, etp=1, world=4),
    Layout(pp=2, cp=2, ep=2, world=4),
)
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("moe"), experts={})


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some layers without experts."""
    return reference.write_checkpoint(tmp_path_factory.mktemp("mixed"), experts={"mlp_only_layers": [1]})


@pytest.fixture(scope="module")
def linear_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("linear"), **reference.KINDS["linear-experts"])


def groups() -> list[list[reference.Conversation]]:
    """Packs with little and with much padding, of differing share of supervised tokens."""
    kinds = ((("mixed", 2), ("text", 3), ("image", 4)), (("text", 5),), (("images", 6), ("video", 7)), (("image", 8),))
    return [[reference.conversation(kind, seed) for kind, seed in group] for group in kinds]


@cache
@reference.recurrent_delta_rule()
def expected(folder: Path, aux: float, z: float) -> Gradients:
    """Gradients of transformers' model, run conversation by conversation, with the losses by their formula."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    logits: dict[str, list[torch.Tensor]] = {n: [] for n, _ in model.named_modules() if n.endswith("mlp.gate")}
    for name, layer in logits.items():
        model.get_submodule(name).register_forward_hook(lambda _, __, output, layer=layer: layer.append(output[0]))
    moe = read_config(folder).text.moe
    assert moe is not None
    total, supervised = torch.zeros(()), 0
    for group in groups():
        for c in group:
            total = total + reference.token_losses(model(**reference.model_inputs(c)).logits[0], c.labels).sum()
            supervised += int((c.labels != -100).sum())
        for layer in logits.values():
            pack = torch.cat(layer)
            total = (
                total
                + aux * len(pack) * balance(pack, moe.num_experts_per_tok)
                + z * pack.logsumexp(dim=-1).square().sum()
            )
            layer.clear()
    (total / supervised).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def every_layout() -> Iterator[Any]:
    """The rows of the matrix with experts; those that `make test` runs, and the rest."""
    rows = matrix.layouts("experts")
    assert set(SMALL) <= set(rows)
    for layout in rows:
        yield layout if layout in SMALL else later(layout)


def balance(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """E * sum_i f_i * P_i of logits `[T, E]`, expert by expert."""
    tokens, experts = logits.shape
    probabilities = logits.softmax(dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    shares = [((chosen == i).sum() / (tokens * top_k)) * probabilities[:, i].mean() for i in range(experts)]
    return experts * torch.stack(shares).sum()


def found(pool: Pool, layout: Layout, folder: Path, length: int = PACK_LENGTH, **overrides: Any) -> Gradients:
    packs = [reference.pack(group, length) for group in groups()]
    results = pool.run(ranks.forward_backward, layout, folder=folder, packs=packs, **overrides)
    config = read_config(folder)
    shards = ranks.assemble([r["gradients"] for r in results])
    return find(config).table(config, ExpertLayout.FUSED_OUT_IN).to_hf(shards)


def check(gradients: Gradients, wanted: Gradients, bound: float = TOLERANCE) -> None:
    assert gradients.keys() == wanted.keys()
    errors = {name: reference.relative_error(gradients[name], x) for name, x in wanted.items()}
    assert not {name: error for name, error in errors.items() if not error < bound}


@pytest.mark.parametrize(("aux", "z"), [(AUX, 0.0), (0.0, Z)])
def test_each_loss_reaches_every_language_gradient_but_the_head(folder: Path, aux: float, z: float) -> None:
    """Else the other tests would prove nothing of it."""
    plain, wanted = expected(folder, 0.0, 0.0), expected(folder, aux, z)
    last = f"layers.{read_config(folder).text.num_layers - 1}."
    behind = ("lm_head", "language_model.norm", f"{last}mlp.experts")
    unmoved: Sequence[str] = [n for n, x in wanted.items() if reference.relative_error(x, plain[n]) < 100 * TOLERANCE]
    assert unmoved
    assert all(any(part in name for part in behind) for name in unmoved)


@pytest.mark.parametrize("layout", list(every_layout()), ids=str)
def test_every_layout_gives_the_formulas_gradients(pool: Pool, folder: Path, layout: Layout) -> None:
    gradients = found(pool, layout, folder, moe_aux_loss_coeff=AUX, moe_z_loss_coeff=Z)
    check(gradients, expected(folder, AUX, Z))


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2, sp=True, world=2), *map(later, (Layout(cp=2, world=2), Layout(pp=2, world=2)))],
    ids=str,
)
def test_three_times_the_padding_changes_nothing(pool: Pool, folder: Path, layout: Layout) -> None:
    """Under sequence parallelism the last ranks then hold nothing but padding."""
    gradients = found(pool, layout, folder, 3 * PACK_LENGTH, moe_aux_loss_coeff=AUX, moe_z_loss_coeff=Z)
    check(gradients, expected(folder, AUX, Z))


@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2, world=2), later(ALL_BUT_CP)], ids=str)
def test_recomputed_layers_count_the_losses_once(pool: Pool, folder: Path, layout: Layout) -> None:
    gradients = found(pool, layout, folder, moe_aux_loss_coeff=AUX, moe_z_loss_coeff=Z, **RECOMPUTED)
    check(gradients, expected(folder, AUX, Z))


@pytest.mark.parametrize("layout", [Layout(), later(ALL_BUT_CP)], ids=str)
def test_layers_without_experts_have_no_loss(pool: Pool, mixed_folder: Path, layout: Layout) -> None:
    gradients = found(pool, layout, mixed_folder, moe_aux_loss_coeff=AUX, moe_z_loss_coeff=Z)
    check(gradients, expected(mixed_folder, AUX, Z))


@pytest.mark.parametrize(
    "layout", [Layout(), *map(later, (ALL_BUT_CP, Layout(tp=2, sp=True, cp=2, ep=2, etp=1, world=4)))], ids=str
)
def test_a_shared_expert_and_linear_attention(pool: Pool, linear_folder: Path, layout: Layout) -> None:
    gradients = found(pool, layout, linear_folder, moe_aux_loss_coeff=AUX, moe_z_loss_coeff=Z)
    check(gradients, expected(linear_folder, AUX, Z), tolerance(read_config(linear_folder)))
