"""A layout or architecture that no test proves is refused by name; a proved one passes."""

import copy
import dataclasses
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge import families, read_config
from megatron_vlbridge.backends import te
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.transformer_config import language_config, vision_config
from megatron_vlbridge.training import guards, settings
from tests.functional.kinds import KINDS

CHECKPOINTS = {
    kind: read_config(Path(__file__).parents[1] / "data" / "configs" / f"{name}.json")
    for kind, name in {
        "dense": "Qwen3-VL-2B-Instruct",
        "experts": "Qwen3-VL-30B-A3B-Instruct",
        "linear": "Qwen3.5-27B",
        "linear-experts": "Qwen3.5-35B-A3B",
    }.items()
}
CHECKPOINT, EXPERTS = CHECKPOINTS["dense"], CHECKPOINTS["experts"]

# A value of each guarded field that nobody proved.
UNPROVED = {
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
    "mtp_use_repeated_layer": True,
    "mtp_detach_heads": True,
    "moe_token_dispatcher_type": "flex",
    "cross_entropy_loss_fusion": True,
    "recompute_method": "other",
    "recompute_modules": ["mlp", "moe_act"],
    "fp8": "hybrid",
    "fp4": "e2m1",
    "calculate_per_token_loss": False,
    "cpu_offloading": True,
    "fine_grained_activation_offloading": True,
    "cuda_graph_impl": "local",
    "enable_cuda_graph": True,
    "external_cuda_graph": True,
    "tp_comm_overlap": True,
    "distribute_saved_activations": True,
    "fp16": True,
    "fp32_residual_connection": True,
    "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
    "moe_router_fusion": True,
    "mlp_chunks_for_training": 2,
    "moe_expert_capacity_factor": 1.0,
    "moe_input_jitter_eps": 0.1,
    "moe_router_enable_expert_bias": True,
    "multi_latent_attention": True,
    "experimental_attention_variant": "gated_delta_net",
    "attention_output_gate": True,
    "heterogeneous_block_specs": True,
    "apply_residual_connection_post_layernorm": True,
    "apply_query_key_layer_scaling": True,
    "softmax_scale": 0.5,
    "softmax_type": "learnable",
    "no_rope_freq": [0] * 28,
    "qk_l2_norm": True,
    "qk_clip": True,
    "use_mup": True,
    "attention_backend": AttnBackend.flash,
    "flash_attention_version": 2,
    "transformer_impl": "inference_optimized",
    "use_te_rng_tracker": True,
    "inference_rng_tracker": True,
}


def proved(**fields: object) -> TransformerConfig:
    return language_config(CHECKPOINT, calculate_per_token_loss=True, params_dtype=torch.bfloat16, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tensor_model_parallel_size": 4, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.bfloat16, "bf16": True},
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
)
def test_proved_layouts_pass(fields):
    guards.check_layout(proved(**fields), CHECKPOINT)


def test_every_field_with_several_verified_values_or_a_note_is_tested_here():
    assert UNPROVED.keys() >= settings.VERIFIED.keys() | settings.VERIFIED_ITEMS.keys() | settings.NOTES.keys()
    assert not UNPROVED.keys() & settings.FREE


def test_every_verified_value_passes_and_a_plain_config_has_one_of_them():
    for name, values in settings.VERIFIED.items():
        assert getattr(proved(), name) in values
        for value in values:
            config = proved()
            setattr(config, name, value)
            guards.check_layout(config, CHECKPOINT)


def test_every_choice_of_verified_items_passes():
    for name, items in settings.VERIFIED_ITEMS.items():
        one_or_list = (*items, list(items)) if name == "moe_router_load_balancing_type" else ()
        for value in one_or_list or (None, [], *([item] for item in items), list(items)):
            config = proved()
            setattr(config, name, value)
            guards.check_layout(config, CHECKPOINT)


@pytest.mark.parametrize("name", UNPROVED)
def test_what_is_not_proved_is_refused_by_name(name):
    config = proved()
    assert hasattr(config, name), "Megatron-Core has no such field: the guard would guard nothing"
    setattr(config, name, UNPROVED[name])
    with pytest.raises(VLBridgeError) as refusal:
        guards.check_layout(config, CHECKPOINT)
    first, *faults = str(refusal.value).splitlines()
    assert CHECKPOINT.architecture in first
    decided = name in families.find(CHECKPOINT).language_fields(CHECKPOINT)
    assert faults[1:] == ([] if decided else [f"To run it all the same: --allow-unverified {name}"])
    assert f"{name}={UNPROVED[name]!r}, verified: " in faults[0]
    assert settings.NOTES.get(name, "") in faults[0]


WITH_MTP = replace(CHECKPOINT, text=replace(CHECKPOINT.text, num_mtp_layers=1))


@pytest.mark.parametrize(("hf_config", "layers"), [(CHECKPOINT, 1), (WITH_MTP, None), (WITH_MTP, 2)])
def test_other_prediction_layers_than_the_checkpoints_are_refused(hf_config, layers):
    fields = {"calculate_per_token_loss": True, "params_dtype": torch.bfloat16}
    config = language_config(hf_config, **fields)
    guards.check_layout(config, hf_config)
    assert config.mtp_num_layers == (hf_config.text.num_mtp_layers or None)
    config.mtp_num_layers = layers
    with pytest.raises(VLBridgeError, match=f"mtp_num_layers={layers or 0}"):
        guards.check_layout(config, hf_config)


def test_a_base_with_prediction_layers_that_the_checkpoint_has_not_is_refused():
    with pytest.raises(VLBridgeError, match="mtp_num_layers"):
        language_config(CHECKPOINT, language_config(WITH_MTP))


@pytest.mark.parametrize("name", ["moe_aux_loss_coeff", "moe_z_loss_coeff"])
def test_losses_of_the_router_pass_but_not_with_a_prediction_layer(name):
    for layers in (0, 1):
        hf_config = replace(EXPERTS, text=replace(EXPERTS.text, num_mtp_layers=layers))
        fields = {"calculate_per_token_loss": True, "params_dtype": torch.bfloat16, name: 1e-3}
        config = language_config(hf_config, **fields)
        if layers == 0:
            guards.check_layout(config, hf_config)
            continue
        with pytest.raises(VLBridgeError, match=f"{name}=0.001"):
            guards.check_layout(config, hf_config)


def test_recomputing_several_layers_at_once_is_refused_with_a_prediction_layer():
    """Megatron's prediction layer takes none but 1."""
    fields = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    config = language_config(WITH_MTP, calculate_per_token_loss=True, params_dtype=torch.bfloat16, **fields)
    with pytest.raises(VLBridgeError, match="recompute_num_layers=2"):
        guards.check_layout(config, WITH_MTP)


def test_a_loss_of_each_segment_is_refused_where_routers_are_recomputed_without_their_layer():
    fields = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "moe"]}
    for balancing in ("seq_aux_loss", ["aux_loss", "seq_aux_loss"]):
        config = with_sizes(EXPERTS, **fields, moe_router_load_balancing_type=balancing)
        with pytest.raises(VLBridgeError, match="seq_aux_loss with moe in recompute_modules") as refusal:
            guards.check_layout(config, EXPERTS, allow=["moe_router_load_balancing_type", "recompute_modules"])
        assert "--allow-unverified" not in str(refusal.value)
        config.recompute_modules = ["layernorm"]
        guards.check_layout(config, EXPERTS)
        config.recompute_modules, config.recompute_granularity = ["moe"], None
        guards.check_layout(config, EXPERTS)
    guards.check_layout(with_sizes(EXPERTS, **fields, moe_router_load_balancing_type="global_aux_loss"), EXPERTS)


def other_than(value):
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"


def test_no_other_setting_may_leave_its_default():
    """Whatever Megatron adds is refused until somebody has looked at it."""
    plain = proved()
    names = {field.name for field in dataclasses.fields(plain)}
    assert names > settings.FREE
    for name in sorted(names - settings.FREE - UNPROVED.keys()):
        config = copy.copy(plain)
        setattr(config, name, other_than(getattr(plain, name)))
        with pytest.raises(VLBridgeError, match=f"{name}="):
            guards.check_layout(config, CHECKPOINT)


def test_all_faults_are_named_at_once():
    config = proved()
    config.qk_clip, config.fp8 = True, "hybrid"
    with pytest.raises(VLBridgeError, match=r"fp8='hybrid'[^\n]*\n[^\n]*qk_clip=True"):
        guards.check_layout(config, CHECKPOINT)


def test_a_field_that_megatron_lost_is_not_passed_over():
    with pytest.raises(AttributeError):
        guards.check_layout(SimpleNamespace(), CHECKPOINT)


def test_vision_config_keeps_the_layout_but_not_the_depth():
    layout = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    language = proved(**layout, pipeline_dtype=torch.bfloat16)
    vision = vision_config(CHECKPOINT, language)
    assert (vision.tensor_model_parallel_size, vision.sequence_parallel) == (4, True)
    assert vision.params_dtype == torch.bfloat16
    assert (vision.num_layers, vision.pipeline_model_parallel_size) == (CHECKPOINT.vision.depth, 1)
    assert vision.normalization == "LayerNorm"
    assert vision.activation_func(torch.tensor(1.0)) == torch.nn.functional.gelu(torch.tensor(1.0), approximate="tanh")


def test_recomputed_groups_of_layers_do_not_swallow_deepstack_features():
    language = proved(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=7)
    assert vision_config(CHECKPOINT, language).recompute_num_layers == 1
    assert language.recompute_num_layers == 7


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_tower_recomputes_what_it_has_of_the_modules(kind):
    modules = ["core_attn", "layernorm", "mlp", "moe", "shared_experts"]
    modules += ["gdn_norm_out"] * kind.startswith("linear")
    fields = {"recompute_granularity": "selective"}
    language = language_config(CHECKPOINTS[kind], **fields, recompute_modules=modules)
    assert vision_config(CHECKPOINTS[kind], language).recompute_modules == ["core_attn", "layernorm"]
    assert language.recompute_modules == modules
    experts = language_config(CHECKPOINTS[kind], **fields, recompute_modules=["moe"])
    assert vision_config(CHECKPOINTS[kind], experts).recompute_modules == []


def with_sizes(hf_config, **fields):
    config = language_config(hf_config, calculate_per_token_loss=True, params_dtype=torch.bfloat16)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def test_a_combination_that_no_test_runs_is_refused_with_the_nearest_proved_ones():
    config = with_sizes(CHECKPOINT, tensor_model_parallel_size=2, expert_model_parallel_size=2)
    with pytest.raises(VLBridgeError, match="dimensions tp x ep together are not verified") as refusal:
        guards.check_layout(config, CHECKPOINT)
    assert "nearest that are: tp, none, tp x cp" in str(refusal.value)
    assert str(refusal.value).endswith("To run it all the same: --allow-unverified tp+ep")
    assert guards.check_layout(config, CHECKPOINT, allow=["tp+ep"]) == {"tp+ep"}
    for other in ("ep+tp", "tp", "ep", "tp+ep+cp", "all"):
        with pytest.raises(VLBridgeError, match="tp x ep together"):
            guards.check_layout(config, CHECKPOINT, allow=[other])


def test_only_what_is_named_is_allowed():
    config = with_sizes(
        CHECKPOINT, expert_model_parallel_size=2, moe_input_jitter_eps=0.1, fp32_residual_connection=True
    )
    with pytest.raises(VLBridgeError, match=r"--allow-unverified ep$"):
        guards.check_layout(config, CHECKPOINT)
    with pytest.raises(VLBridgeError) as refusal:
        guards.check_layout(config, CHECKPOINT, allow=["ep", "moe_input_jitter_eps"])
    assert "moe_input_jitter_eps=" not in str(refusal.value)
    assert "fp32_residual_connection=True, verified: False" in str(refusal.value)
    names = ["ep", "fp32_residual_connection", "moe_input_jitter_eps"]
    assert str(refusal.value).endswith(f"--allow-unverified {','.join(names)}")
    assert guards.check_layout(config, CHECKPOINT, allow=[*names, "qk_clip"]) == set(names)


@pytest.mark.parametrize("fields", [{"expert_model_parallel_size": 2}, {"fp32_residual_connection": True}], ids=str)
def test_who_makes_the_loss_is_not_told_of_an_argument(fields):
    config = with_sizes(CHECKPOINT, **fields)
    with pytest.raises(VLBridgeError, match="--allow-unverified"):
        guards.check_layout(config, CHECKPOINT)
    with pytest.raises(VLBridgeError, match="not verified") as refusal:
        guards.check_layout(config, CHECKPOINT, own_loss=True)
    assert "--allow-unverified" not in str(refusal.value)


def test_what_the_checkpoint_decides_cannot_be_allowed():
    config = with_sizes(CHECKPOINT, num_layers=27)
    with pytest.raises(VLBridgeError, match="num_layers=27") as refusal:
        guards.check_layout(config, CHECKPOINT, allow=["num_layers"])
    assert "--allow-unverified" not in str(refusal.value)


def test_the_expert_tensor_parallel_size_is_the_tensor_parallel_size_unless_given():
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for given, used in ((None, "tp sp etp"), (2, "tp sp etp"), (1, "tp sp")):
        config = with_sizes(EXPERTS, **sizes, expert_tensor_parallel_size=given)
        assert guards.used_dimensions(config, EXPERTS) == frozenset(used.split())
    assert guards.used_dimensions(with_sizes(CHECKPOINT, **sizes), CHECKPOINT) == frozenset({"tp", "sp"})


@pytest.mark.parametrize("kind", ["a2a", "all_gather", ["p2p", "a2a"]])
def test_exchanges_of_keys_that_the_cpu_kernels_have_not_are_refused(monkeypatch, kind):
    monkeypatch.setattr(guards.cpu_runtime, "is_enabled", lambda: True)
    config = with_sizes(CHECKPOINT, context_parallel_size=2, cp_comm_type=kind)
    with pytest.raises(VLBridgeError, match="kernels here support p2p, found a"):
        guards.check_layout(config, CHECKPOINT)
    config.context_parallel_size = 1
    guards.check_layout(config, CHECKPOINT)


def test_exchanges_that_transformer_engine_offers(monkeypatch):
    monkeypatch.setattr(guards.cpu_runtime, "is_enabled", lambda: False)
    for kind in ("p2p", "a2a", "all_gather"):
        guards.check_cp_comm_type(with_sizes(CHECKPOINT, context_parallel_size=2, cp_comm_type=kind))
    with pytest.raises(VLBridgeError, match="found a2a\\+p2p"):
        guards.check_cp_comm_type(with_sizes(CHECKPOINT, context_parallel_size=2, cp_comm_type="a2a+p2p"))
    config = with_sizes(CHECKPOINT, context_parallel_size=8, tensor_model_parallel_size=2, cp_comm_type="a2a")
    with pytest.raises(VLBridgeError, match="8 query and 4 key-value heads, expected even multiples of 8"):
        guards.check_cp_comm_type(config)


@pytest.fixture
def on_transformer_engine(monkeypatch):
    monkeypatch.setattr(guards.cpu_runtime, "is_enabled", lambda: False)


@pytest.mark.parametrize("kind", [None, "p2p", "a2a", "all_gather"])
def test_fp32_is_refused_with_context_parallelism_on_transformer_engine(on_transformer_engine, kind):
    sizes = {"context_parallel_size": 2, "cp_comm_type": kind}
    guards.check_layout(with_sizes(CHECKPOINT, **sizes), CHECKPOINT)
    config = with_sizes(CHECKPOINT, **sizes, params_dtype=torch.float32)
    with pytest.raises(VLBridgeError, match=r"context_parallel_size=2\) in float32.*\. Use --bf16, or"):
        guards.check_layout(config, CHECKPOINT)
    config.context_parallel_size = 1
    guards.check_layout(config, CHECKPOINT)


def test_fp32_passes_with_context_parallelism_on_the_cpu_backend(monkeypatch):
    monkeypatch.setattr(guards.cpu_runtime, "is_enabled", lambda: True)
    guards.check_layout(with_sizes(CHECKPOINT, context_parallel_size=2, params_dtype=torch.float32), CHECKPOINT)


def test_the_unfused_attention_is_refused_with_context_parallelism(on_transformer_engine):
    config = with_sizes(CHECKPOINT, context_parallel_size=2, attention_backend=AttnBackend.unfused)
    with pytest.raises(VLBridgeError, match="unfused attention has none"):
        guards.check_layout(config, CHECKPOINT)
    config.context_parallel_size = 1
    guards.check_layout(config, CHECKPOINT)


@pytest.mark.parametrize("way", ["field", "variable", "torch"])
def test_deterministic_kernels_are_refused_on_transformer_engine_alone(monkeypatch, way):
    config = with_sizes(CHECKPOINT, deterministic_mode=way == "field")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0" if way == "variable" else "1")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: way == "torch")
    monkeypatch.setattr(guards.cpu_runtime, "is_enabled", lambda: False)
    named = {"field": "deterministic_mode=True", "variable": "NVTE_ALLOW_NON", "torch": "torch.use_deterministic_alg"}
    with pytest.raises(VLBridgeError, match=rf"deterministic kernels \({named[way]}.*Leave --deterministic-mode out"):
        guards.check_layout(config, CHECKPOINT)
    monkeypatch.setattr(guards.cpu_runtime, "is_enabled", lambda: True)
    guards.check_layout(config, CHECKPOINT)


@pytest.mark.parametrize(
    "name", ["NVTE_FUSED_ATTN_USE_FAv2_BWD", "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM", "NVTE_PLUGIN"]
)
def test_variables_that_choose_unproved_kernels_are_refused(on_transformer_engine, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    guards.check_layout(proved(), CHECKPOINT)
    monkeypatch.setenv(name, "1")
    with pytest.raises(VLBridgeError, match=f"{name}=1 in the environment, verified: not set"):
        guards.check_layout(proved(), CHECKPOINT)


def test_flash_attention_is_refused_where_transformer_engine_would_prefer_it(on_transformer_engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    guards.check_layout(proved(), CHECKPOINT)
    monkeypatch.setattr(te.importlib.util, "find_spec", lambda name: name if name == "flash_attn" else None)
    with pytest.raises(VLBridgeError, match="attention_backend=auto, verified: fused"):
        guards.check_layout(proved(), CHECKPOINT)
    guards.check_layout(proved(attention_backend=AttnBackend.fused), CHECKPOINT)
    fp32 = language_config(CHECKPOINT, params_dtype=torch.float32)
    guards.check_layout(fp32, CHECKPOINT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    guards.check_layout(proved(), CHECKPOINT)


def test_weights_in_more_shards_than_tensor_parallel_ranks_are_refused():
    """`tensor_parallel_num_weight_shards` is free since Megatron turns it into this field."""
    fields = {"calculate_per_token_loss": True, "params_dtype": torch.bfloat16, "tensor_model_parallel_size": 2}
    guards.check_layout(language_config(CHECKPOINT, **fields, tensor_parallel_num_weight_shards=2), CHECKPOINT)
    with pytest.raises(VLBridgeError, match="gtp_weight_remat_size=2"):
        guards.check_layout(language_config(CHECKPOINT, **fields, tensor_parallel_num_weight_shards=4), CHECKPOINT)


def test_virtual_stages_without_overlap_are_refused():
    config = with_sizes(CHECKPOINT, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(VLBridgeError, match="without overlap_p2p_comm"):
        guards.check_layout(config, CHECKPOINT)
    config.overlap_p2p_comm = True
    guards.check_layout(config, CHECKPOINT)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_admitted_is_what_the_rows_of_the_matrix_run(kind):
    from tests.functional import matrix

    run = set()
    for row in matrix.layouts(kind):
        sizes = {name: getattr(row, name) for name in ("tp", "pp", "vpp", "cp", "ep")} | {"sp": 1 + row.sp}
        sizes["etp"] = (row.etp or row.tp) if KINDS[kind].experts else 1
        run.add(frozenset(name for name, size in sizes.items() if size > 1))
        kinds = {(v.recompute != "", v.mtp, v.tied) for v in matrix.variants(kind, row)}
        assert len(kinds) == (6 if row.world > 2 else 8) or row in KINDS[kind].others or not KINDS[kind].every_variant
    assert run == families.find(CHECKPOINTS[kind]).combinations


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_dimensions_is_in_a_row(kind):
    from tests.functional import matrix

    seen = set()
    for row in matrix.layouts(kind):
        for v in matrix.variants(kind, row):
            names = matrix.dimensions(row, v)
            seen |= {frozenset(pair) for pair in combinations(sorted(names), 2)}
    dimensions = ["cp", "dp", "mtp", "padded", "pp", "recompute", "sp", "tied", "tp", "vpp"]
    dimensions += ["ep", "etp"] if KINDS[kind].experts else []
    missing = {frozenset(pair) for pair in combinations(dimensions, 2)} - seen
    assert missing == {frozenset({"padded", "cp"})}, "a padded batch is refused under context parallelism"


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_layouts_has_every_row_of_the_matrix_and_no_other(kind):
    from tests.functional import matrix
    from tests.functional.parity import tolerance
    from tests.functional.write_layouts import PAGE, first_cells

    table = PAGE.read_text().split(f"\n## {KINDS[kind].model}\n")[1].split("\n## ")[0].strip().splitlines()[2:]
    rows = [first_cells(kind, layout) for layout in matrix.layouts(kind)]
    assert len(table) == len(rows)
    for line, cells in zip(table, rows, strict=True):
        assert line.startswith(cells)
        figures = [float(cell) for cell in line.removeprefix(cells).split("|")[1:4]]
        assert len(figures) == 3
        assert max(figures) < tolerance(CHECKPOINTS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_layouts_counts_every_variant(kind):
    from tests.functional import matrix
    from tests.functional.write_layouts import PAGE

    runs = sum(len(matrix.variants(kind, layout)) for layout in matrix.layouts(kind))
    assert f"\n- {KINDS[kind].model}: {runs} runs, " in PAGE.read_text()


@pytest.mark.parametrize("sizes", [(16, 2), (3, 1), (8, 4), (1, 32)])
def test_sizes_that_linear_attention_cannot_be_spread_over_are_rejected_with_those_that_work(sizes):
    """Megatron-Core ends with an AssertionError."""
    hf_config = read_config(Path(__file__).parents[1] / "data" / "configs" / "Qwen3.5-27B.json")
    names = ("tensor_model_parallel_size", "context_parallel_size")
    with pytest.raises(VLBridgeError, match=r"does not divide the 16 key heads .* one of 1, 2, 4, 8, 16$"):
        language_config(hf_config, **dict(zip(names, sizes, strict=True)))
    language_config(hf_config, **dict(zip(names, (8, 2), strict=True)))


def test_linear_attention_on_a_gpu_needs_its_kernels_and_their_dtypes(on_transformer_engine, monkeypatch):
    hf_config = CHECKPOINTS["linear"]
    config = language_config(hf_config, calculate_per_token_loss=True, params_dtype=torch.bfloat16)
    monkeypatch.setattr(te.gated_delta_net, "HAVE_FLA", True)
    guards.check_layout(config, hf_config)
    with pytest.raises(VLBridgeError, match=r"linear attention in float32.*--bf16"):
        guards.check_layout(language_config(hf_config, calculate_per_token_loss=True), hf_config)
    monkeypatch.setattr(te.gated_delta_net, "HAVE_FLA", False)
    with pytest.raises(VLBridgeError, match=r"without flash-linear-attention.*pip install"):
        guards.check_layout(config, hf_config)
