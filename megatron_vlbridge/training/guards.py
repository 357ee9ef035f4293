"""What has been proved equal to the reference may start; everything else is refused."""

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError

# Field of TransformerConfig -> the values that the tests prove (tests/functional/), and the words for a person.
_PROVED: dict[str, tuple[tuple[object, ...], str]] = {
    "cp_comm_type": ((None, "p2p"), "another exchange between context-parallel ranks than p2p"),
    "moe_aux_loss_coeff": ((0.0,), "an auxiliary loss of the router"),
    "moe_z_loss_coeff": ((None,), "a z-loss of the router"),
    "moe_expert_capacity_factor": ((None,), "tokens dropped by experts"),
    "moe_input_jitter_eps": ((None,), "a jittered router"),
    "moe_router_enable_expert_bias": ((False,), "a biased router"),
    "virtual_pipeline_model_parallel_size": ((None, 1), "virtual pipeline stages"),
    "pipeline_model_parallel_layout": ((None,), "a pipeline layout string"),
    "account_for_embedding_in_pipeline_split": ((False,), "an embedding stage of its own"),
    "account_for_loss_in_pipeline_split": ((False,), "a loss stage of its own"),
    "mtp_num_layers": ((None, 0), "multi-token prediction"),
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


# Which dimensions larger than one a test runs together, for dense models and for experts; the sizes are arithmetic.
_DENSE = ("", "tp", "tp sp", "pp", "cp", "tp pp", "tp sp pp", "tp cp", "tp sp cp", "pp cp", "tp sp pp cp")
_EXPERTS = ("", "tp sp", "pp", "cp", "ep", "ep pp", "ep tp sp", "ep cp", "ep tp sp cp", "ep tp sp pp", "ep pp cp")


def check_combination(config: TransformerConfig, checkpoint: Config) -> None:
    """Refuse parallel dimensions together that no test runs together for this kind of model.

    Raises:
        VLBridgeError: naming the combination and those that are proved.
    """
    sizes = {
        "tp": config.tensor_model_parallel_size,
        "sp": 2 if config.sequence_parallel else 1,
        "pp": config.pipeline_model_parallel_size,
        "cp": config.context_parallel_size,
        "ep": config.expert_model_parallel_size,
    }
    used = {name for name, size in sizes.items() if size > 1}
    proved = _DENSE if checkpoint.text.moe is None else _EXPERTS
    if used not in [set(names.split()) for names in proved]:
        raise VLBridgeError(
            f"{checkpoint.architecture}: the dimensions {' x '.join(sorted(used))} together are not proved equal to "
            f"transformers, so they are refused. Proved: {', '.join(' x '.join(n.split()) or 'none' for n in proved)}; "
            "each with any data-parallel size"
        )


def check_layout(config: TransformerConfig, checkpoint: Config) -> None:
    """Refuse a layout that no test proves for this family.

    Raises:
        VLBridgeError: naming every setting that is not proved, and what is.
    """
    check_combination(config, checkpoint)
    faults = [
        f"{words}: {name}={getattr(config, name)!r}, proved: {' or '.join(map(repr, values))}"
        for name, (values, words) in _PROVED.items()
        if getattr(config, name) not in values
    ]
    if faults:
        raise VLBridgeError(
            f"{checkpoint.architecture}: not proved equal to transformers, so it is refused:\n  " + "\n  ".join(faults)
        )
