"""The router's losses: gradients equal a plain formula on transformers' router logits, whatever padding and layout."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertForm
from megatron_vlbridge.training.metrics.columns import LOSSES
from tests import reference
from tests.cases import later
from tests.functional import matrix, ranks
from tests.functional.parity import PACK_LENGTH, TOLERANCE, tolerance
from tests.functional.pool import Layout, Pool

AUX, Z = 0.5, 0.05
RECOMPUTED: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ALL_BUT_CP = Layout(tp=2, sp=True, pp=2, ep=2, etp=1, world=4)
# One layout of each dimension, and all but the tensor-parallel ones together.
SMALL = (
    Layout(world=2),
    Layout(tp=2, sp=True, etp=2, world=2),
    Layout(cp=2, world=2),
    Layout(pp=2, vpp=2, world=2),
    Layout(pp=2, cp=2, ep=2, world=4),
)
# Several losses at once have coefficients of their own.
COEFFICIENTS = {"aux_loss": AUX, "seq_aux_loss": 2 * AUX, "global_aux_loss": 3 * AUX}
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
def expected(folder: Path, aux: float, z: float, kind: str = "aux_loss", dp: int = 1) -> Gradients:
    """Gradients of transformers' model, run conversation by conversation, with the losses by their formula.

    `dp` packs are run at a time, which `global_aux_loss` depends on.
    """
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    logits: dict[str, list[torch.Tensor]] = {n: [] for n, _ in model.named_modules() if n.endswith("mlp.gate")}
    for name, layer in logits.items():
        model.get_submodule(name).register_forward_hook(lambda _, __, output, layer=layer: layer.append(output[0]))
    moe = read_config(folder).text.moe
    assert moe is not None
    total, supervised = torch.zeros(()), 0
    for c in (c for group in groups() for c in group):
        total = total + reference.token_losses(model(**reference.model_inputs(c)).logits[0], c.labels).sum()
        supervised += int((c.labels != -100).sum())
    for layer in logits.values():
        rest = iter(layer)
        packs = [[next(rest) for _ in group] for group in groups()]
        total = total + z * torch.cat(layer).logsumexp(dim=-1).square().sum()
        total = total + aux * balancing_loss(kind, packs, moe.num_experts_per_tok, dp)
    (total / supervised).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def every_layout() -> Iterator[Any]:
    """The rows of the matrix with experts; those that `make test` runs, and the rest."""
    rows = matrix.layouts("experts")
    assert set(SMALL) <= set(rows)
    for layout in rows:
        yield layout if layout in SMALL else later(layout)


def balancing_loss(kind: str, packs: Sequence[Sequence[torch.Tensor]], top_k: int, dp: int) -> torch.Tensor:
    """The sum of T * E * sum_i f_i * P_i, of packs of the logits `[t, E]` of each conversation."""
    joined = [torch.cat(tuple(pack)) for pack in packs]
    if kind == "aux_loss":
        pairs = [(pack, pack) for pack in joined]
    elif kind == "seq_aux_loss":
        pairs = [(segment, segment) for pack in packs for segment in pack]
    else:
        pairs = [(pack, torch.cat(joined[: (index // dp + 1) * dp])) for index, pack in enumerate(joined)]
    return torch.stack([len(counted) * balance(counted, seen, top_k) for counted, seen in pairs]).sum()


def balance(counted: torch.Tensor, seen: torch.Tensor, top_k: int) -> torch.Tensor:
    """E * sum_i f_i * P_i, expert by expert: P of the logits `counted` `[T, E]`, f of those `seen`."""
    experts, chosen = counted.shape[1], seen.topk(top_k, dim=-1).indices
    shares = [(chosen == i).sum() / chosen.numel() * counted.softmax(dim=-1)[:, i].mean() for i in range(experts)]
    return experts * torch.stack(shares).sum()


def found(pool: Pool, layout: Layout, folder: Path, length: int = PACK_LENGTH, **overrides: Any) -> Gradients:
    packs = [reference.pack(group, length) for group in groups()]
    results = pool.run(ranks.forward_backward, layout, folder=folder, packs=packs, **overrides)
    config = read_config(folder)
    shards = ranks.assemble([r["gradients"] for r in results])
    return find(config).table(config, ExpertForm.FUSED_OUT_IN).to_hf(shards)


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
    """Of all losses together."""
    plain = expected(folder, 0.0, Z)
    parts = [expected(folder, coefficient, Z, kind, layout.dp) for kind, coefficient in COEFFICIENTS.items()]
    wanted = {name: x + sum(part[name] - x for part in parts) for name, x in plain.items()}
    settings = {"moe_router_load_balancing_type": [*COEFFICIENTS], "moe_aux_loss_coeff": [*COEFFICIENTS.values()]}
    check(found(pool, layout, folder, moe_z_loss_coeff=Z, **settings), wanted)


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_one_loss(pool: Pool, folder: Path, kind: str) -> None:
    gradients = found(pool, Layout(), folder, moe_router_load_balancing_type=kind, moe_aux_loss_coeff=AUX)
    wanted = expected(folder, AUX, 0.0, kind)
    check(gradients, wanted)
    router = "model.language_model.layers.0.mlp.gate.weight"
    for other in COEFFICIENTS.keys() - {kind}:
        others = expected(folder, AUX, 0.0, other)
        assert reference.relative_error(wanted[router], others[router]) > 100 * TOLERANCE, (
            "the data do not tell them apart"
        )


RECOMPUTED_PIPELINE = (
    (Layout(pp=2, world=2), "seq_aux_loss", RECOMPUTED),
    (Layout(pp=2, world=2), "global_aux_loss", RECOMPUTED),
    (Layout(pp=2, world=2), "global_aux_loss", {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    (Layout(cp=2, world=4), "seq_aux_loss", RECOMPUTED | {"recompute_method": "block"}),
)


@pytest.mark.parametrize(
    ("layout", "kind", "options"),
    [pytest.param(*row, marks=[pytest.mark.layouts] * (index > 0)) for index, row in enumerate(RECOMPUTED_PIPELINE)],
)
def test_a_recomputed_router_sees_its_own_pack(
    pool: Pool, folder: Path, layout: Layout, kind: str, options: dict[str, Any]
) -> None:
    """Other packs have run in between on the first stage."""
    gradients = found(pool, layout, folder, moe_router_load_balancing_type=kind, moe_aux_loss_coeff=AUX, **options)
    check(gradients, expected(folder, AUX, 0.0, kind, layout.dp))


LOGGED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def router_gradients(layout: Layout, folder: Path, tokens: torch.Tensor, kind: str) -> list[list[torch.Tensor]]:
    """Of two micro-batches `[S, B, H]`: the gradient and what is logged, of Megatron's router and this package's."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_vlbridge.model.router import PackRouter
    from megatron_vlbridge.model.transformer_config import language_config

    balancing: dict[str, Any] = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": AUX}
    config = language_config(read_config(folder), **balancing, use_cpu_initialization=True)
    results = []
    for router_class in (TopKRouter, PackRouter):
        get_moe_metrics_tracker().clear()
        router = router_class(config, ProcessGroupCollection.use_mpu_process_groups())
        router.set_layer_number(1)
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
        router.segments = torch.arange(tokens.shape[2]).repeat(tokens.shape[1]), tokens.shape[2]
        for batch in tokens:
            router(batch)[0].sum().backward()
        results.append([router.weight.grad, get_moe_metrics_tracker().metrics[LOGGED[kind]].values.clone()])
    return results


def test_each_logged_loss_has_a_column_in_the_csv_file() -> None:
    assert set(LOGGED.values()) < set(LOSSES.values())


@pytest.mark.parametrize("kind", LOGGED)
def test_packs_without_padding_have_the_loss_of_megatrons_router(pool: Pool, folder: Path, kind: str) -> None:
    """On one rank, with segments of one length: Megatron's own samples of a batch."""
    tokens = torch.randn(2, 12, 3, 64, generator=torch.Generator().manual_seed(0))
    (theirs, mine), *_ = pool.run(router_gradients, Layout(), folder=folder, tokens=tokens, kind=kind)
    for found, expected in zip(mine, theirs, strict=True):
        assert expected.abs().max() > 0.01
        assert reference.relative_error(found, expected) < TOLERANCE


def counts_of_a_bf16_router(layout: Layout, folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often a cast router's experts were chosen in these micro-batches, and its own counts after them."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_vlbridge.model.router import PackRouter
    from megatron_vlbridge.model.transformer_config import language_config

    balancing: dict[str, Any] = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": AUX}
    config = language_config(read_config(folder), **balancing, use_cpu_initialization=True)
    router = PackRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    router.bfloat16()
    chosen = torch.stack([router(batch.bfloat16())[1].sum(dim=0) for batch in tokens]).sum(dim=0)
    counted = router.global_tokens_per_expert.clone()
    router.reset_global_aux_loss_tracker()
    assert not router.global_tokens_per_expert.any()
    return chosen, counted


def test_a_bf16_model_counts_choices_exactly(pool: Pool, folder: Path) -> None:
    """bf16 has no odd number above 256."""
    tokens = torch.randn(3, 401, 1, 64, generator=torch.Generator().manual_seed(0))
    ((chosen, counted),) = pool.run(counts_of_a_bf16_router, Layout(), folder=folder, tokens=tokens)
    assert torch.equal(chosen, counted.long())
    assert not torch.equal(chosen, chosen.bfloat16().long())


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
