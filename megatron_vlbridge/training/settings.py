"""Which values of Megatron's settings the tests prove."""

import dataclasses
import functools

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge import families
from megatron_vlbridge.config import Config
from megatron_vlbridge.model.transformer_config import language_config

# Field of TransformerConfig -> the values that the tests prove (tests/functional/), and the words for a person.
PROVED: dict[str, tuple[tuple[object, ...], str]] = {
    "moe_router_load_balancing_type": (("aux_loss", "none"), "another balancing of the experts than by aux_loss"),
    "moe_router_fusion": ((False,), "fused kernels of the router"),
    "mlp_chunks_for_training": ((1,), "layers run in chunks, where the router's losses would count padding"),
    "moe_expert_capacity_factor": ((None,), "tokens dropped by experts"),
    "moe_input_jitter_eps": ((None,), "a jittered router"),
    "moe_router_enable_expert_bias": ((False,), "a biased router"),
    "account_for_embedding_in_pipeline_split": ((False,), "an embedding stage of its own"),
    "account_for_loss_in_pipeline_split": ((False,), "a loss stage of its own"),
    "mtp_use_repeated_layer": ((False,), "a prediction layer that is used several times"),
    "mtp_detach_heads": ((False,), "a prediction layer whose loss does not train the rest"),
    "moe_token_dispatcher_type": (("allgather", "alltoall"), "another dispatcher of tokens to experts"),
    # Its gradient is rounded to bf16 (Megatron-Core 0.19, fused_cross_entropy.py), in fp32 runs too: 1e-3 of each.
    "cross_entropy_loss_fusion": ((False,), "a fused loss"),
    "recompute_method": ((None, "uniform", "block"), "another way to recompute"),
    "recompute_modules": ((None, [], ["core_attn"]), "other modules recomputed selectively than core_attn"),
    "attention_backend": (
        (AttnBackend.auto, AttnBackend.fused, AttnBackend.unfused),
        "attention by kernels that no test runs (use --attention-backend auto or fused)",
    ),
    "flash_attention_version": ((None,), "a chosen version of flash-attention"),
    "transformer_impl": (("transformer_engine", "local"), "layers for inference"),
    "use_te_rng_tracker": ((False,), "Transformer Engine's random states, which serve CUDA graphs"),
    # Tensor-parallel ranks would be initialised alike.
    "inference_rng_tracker": ((False,), "random states for inference"),
    "fp8": ((None,), "fp8"),
    "fp4": ((None,), "fp4"),
    "calculate_per_token_loss": (
        (True,),
        "a loss averaged by anything but the tokens (use --calculate-per-token-loss)",
    ),
    "cpu_offloading": ((False,), "activation offloading"),
    "fine_grained_activation_offloading": ((False,), "activation offloading"),
    "cuda_graph_impl": (("none", None), "CUDA graphs"),
    "enable_cuda_graph": ((False,), "CUDA graphs"),
    "external_cuda_graph": ((False,), "CUDA graphs"),
    "tp_comm_overlap": ((False,), "overlapped tensor-parallel communication, whose buffers have one fixed length"),
    "distribute_saved_activations": ((False,), "recomputation with activations spread over the ranks"),
    "fp16": ((False,), "fp16 (use --bf16)"),
    "fp32_residual_connection": ((False,), "a residual stream in fp32"),
    # What would make it another architecture than the checkpoint's.
    "multi_latent_attention": ((False,), "multi-latent attention"),
    "experimental_attention_variant": ((None,), "another attention"),
    "attention_output_gate": ((False,), "gated attention"),
    "heterogeneous_block_specs": ((False,), "layers of several kinds"),
    "apply_residual_connection_post_layernorm": ((False,), "a residual taken after the norm"),
    "apply_query_key_layer_scaling": ((False,), "attention scaled by layer"),
    "softmax_scale": ((None,), "another softmax scale"),
    "softmax_type": (("vanilla",), "another softmax"),
    "no_rope_freq": ((None,), "layers without rotary embedding"),
    "qk_l2_norm": ((False,), "L2 norm of queries and keys"),
    "qk_clip": ((False,), "clipped queries and keys"),
    "use_mup": ((False,), "maximal update parametrisation"),
}

# What says how large, how precise, how initialised, how measured or how overlapped a run is, or is checked elsewhere
# (guards.py); and what only chooses between kernels of one result. No other setting may leave its default.
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


def setting_faults(config: TransformerConfig, checkpoint: Config) -> list[str]:
    """Every setting in `config` that is neither proved nor free, with what is proved of it, in words for a person."""
    faults = [
        f"{words}: {name}={getattr(config, name)!r}, proved: {' or '.join(map(repr, values))}"
        for name, (values, words) in PROVED.items()
        if getattr(config, name) not in values
    ]
    plain, decided = _plain(checkpoint), families.find(checkpoint).language_fields(checkpoint)
    for name in sorted({field.name for field in dataclasses.fields(config)} - PROVED.keys() - FREE):
        found, default = getattr(config, name), getattr(plain, name)
        if found != default:
            kind = "the checkpoint's" if name in decided else "the default"
            faults.append(f"a setting that no test runs: {name}={found!r}, proved: {default!r}, {kind}")
    return faults


@functools.cache
def _plain(checkpoint: Config) -> TransformerConfig:
    return language_config(checkpoint)
