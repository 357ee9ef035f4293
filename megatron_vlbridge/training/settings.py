"""Which values of Megatron's settings the tests verify."""

import dataclasses
import functools

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge import families
from megatron_vlbridge.config import Config
from megatron_vlbridge.model.router import BALANCING
from megatron_vlbridge.model.transformer_config import language_config

# Fields of TransformerConfig of which the tests verify more values than the one of a plain config.
VERIFIED: dict[str, tuple[object, ...]] = {
    "moe_token_dispatcher_type": ("allgather", "alltoall"),
    "recompute_method": (None, "uniform", "block"),
    "attention_backend": (AttnBackend.auto, AttnBackend.fused, AttnBackend.unfused),
    "transformer_impl": ("transformer_engine", "local"),
    "cuda_graph_impl": ("none", None),
}

# Fields that are one or a list, each of whose items is verified alone and with all the others.
VERIFIED_ITEMS: dict[str, tuple[str, ...]] = {
    "moe_router_load_balancing_type": ("none", *BALANCING),
    "recompute_modules": ("core_attn", "layernorm", "mlp", "moe", "shared_experts", "gdn_norm_out"),
}

# What an error adds where the name of the field does not show the reason or the remedy.
NOTES = {
    "calculate_per_token_loss": "use --calculate-per-token-loss",
    "fp16": "use --bf16",
    "attention_backend": "use --attention-backend auto or fused",
    # Source: fused_cross_entropy.py of Megatron-Core 0.19; 1e-3 of each value.
    "cross_entropy_loss_fusion": "its gradient is rounded to bf16, in fp32 runs too",
    "mlp_chunks_for_training": "the losses of the router would count padding",
    # Source: apply_router_token_dropping (moe_utils.py) of Megatron-Core 0.19.
    "moe_expert_capacity_factor": "each rank would drop tokens by itself, padding among them",
    # Source: set_activation_dtype (module/base.py) of Transformer Engine 2.20.
    "fp32_residual_connection": "the layers take input and weights of one dtype",
    "recompute_modules": "moe_act is of Transformer Engine's experts alone",
    "tp_comm_overlap": "its buffers have one fixed length",
    "inference_rng_tracker": "tensor-parallel ranks would be initialised alike",
}

# Sizes, precision, initialisation, measurement and overlap of a run; what is checked elsewhere (guards.py); and choices
# between kernels with the same result. Any other setting must have its value in a plain config.
_FREE_NAMES = """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel
    context_parallel_size cp_comm_type expert_model_parallel_size expert_tensor_parallel_size
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout mtp_standalone
    pipeline_model_parallel_comm_backend pipeline_dtype variable_seq_lengths overlap_p2p_comm batch_p2p_comm
    batch_p2p_sync deallocate_pipeline_outputs microbatch_group_size_per_vp_stage bf16 params_dtype autocast_dtype
    perform_initialization use_cpu_initialization init_method output_layer_init_method
    embedding_init_method embedding_init_method_std timers finalize_model_grads_func grad_scale_func
    moe_grad_scale_func mtp_grad_scale_func no_sync_func grad_sync_func param_sync_func barrier_with_L1_time
    config_logger_dir moe_per_layer_logging deterministic_mode gradient_accumulation_fusion
    attention_softmax_in_fp32 masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion
    disable_bf16_reduced_precision_matmul tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag
    tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_atomic_ag tp_comm_atomic_rs
    tp_comm_bootstrap_backend recompute_granularity recompute_num_layers mtp_num_layers mtp_loss_scaling_factor
    moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate moe_grouped_gemm clone_scatter_output_in_embedding
    tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards inference_sampling_seed
"""
FREE = frozenset(_FREE_NAMES.split())

_plain_config = functools.cache(language_config)


def setting_faults(config: TransformerConfig, hf_config: Config) -> dict[str, str]:
    """Every setting in `config` that is neither verified nor free, by name, as a line with its verified values."""
    plain, decided = _plain_config(hf_config), families.find(hf_config).language_fields(hf_config)
    faults = {}
    for name in sorted({field.name for field in dataclasses.fields(config)} - FREE):
        found, items = getattr(config, name), VERIFIED_ITEMS.get(name)
        values = items or VERIFIED.get(name, (getattr(plain, name),))
        if not (set([found] if isinstance(found, str) else found or ()) <= set(values) if items else found in values):
            kind = ", the checkpoint's" if name in decided else ""
            note = f" ({NOTES[name]})" if name in NOTES else ""
            verified = f"any of {', '.join(items)}" if items else " or ".join(map(repr, values))
            faults[name] = f"{name}={found!r}, verified: {verified}{kind}{note}"
    return faults
