"""A layout or architecture that no test proves is refused by name; a proved one passes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.config import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.transformer_config import language_config, vision_config
from megatron_vlbridge.training import guards

CHECKPOINT = read_config(Path(__file__).parents[1] / "data" / "configs" / "Qwen3-VL-2B-Instruct.json")

# A value of each guarded field that nobody proved.
UNPROVED = {
    "cp_comm_type": "a2a",
    "virtual_pipeline_model_parallel_size": 2,
    "pipeline_model_parallel_layout": "Et*14|t*14L",
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
    "mtp_num_layers": 1,
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
    "moe_aux_loss_coeff": 1e-3,
    "moe_z_loss_coeff": 1e-3,
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


def test_every_guarded_field_is_tested_here():
    assert UNPROVED.keys() == guards._PROVED.keys()


@pytest.mark.parametrize("name", UNPROVED)
def test_what_is_not_proved_is_refused_by_name(name):
    config = proved()
    assert hasattr(config, name), "Megatron-Core has no such field: the guard would guard nothing"
    setattr(config, name, UNPROVED[name])
    with pytest.raises(VLBridgeError) as refusal:
        guards.check_layout(config, CHECKPOINT)
    first, *faults = str(refusal.value).splitlines()
    assert CHECKPOINT.architecture in first
    assert len(faults) == 1
    assert f"{name}={UNPROVED[name]!r}, proved: " in faults[0]


def test_all_faults_are_named_at_once():
    config = proved()
    config.cp_comm_type, config.fp8 = "a2a", "hybrid"
    with pytest.raises(VLBridgeError, match=r"cp_comm_type='a2a'[^\n]*\n[^\n]*fp8='hybrid'"):
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


@pytest.mark.parametrize(
    ("fields", "used"),
    [
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2},
            "cp x pp x tp",
        ),
        ({"expert_model_parallel_size": 2}, "ep"),
    ],
)
def test_a_combination_that_no_test_runs_is_refused_by_name(fields, used):
    config = proved()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(VLBridgeError, match=f"the dimensions {used} together are not proved"):
        guards.check_layout(config, CHECKPOINT)


@pytest.mark.parametrize("table", ["_DENSE", "_EXPERTS"])
def test_the_table_of_combinations_is_what_the_layout_tests_run(table):
    from tests.functional import test_layouts, test_moe

    rows = test_layouts.LAYOUTS if table == "_DENSE" else test_moe.LAYOUTS
    run = {frozenset()} | {
        frozenset(
            name
            for name, size in (("tp", x.tp), ("pp", x.pp), ("cp", x.cp), ("ep", x.ep), ("sp", 1 + x.sp))
            if size > 1
        )
        for x in rows
    }
    assert {frozenset(names.split()) for names in getattr(guards, table)} == run
