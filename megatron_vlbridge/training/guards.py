"""What has been proved equal to the reference may start; everything else is refused."""

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError

# Field of TransformerConfig -> the values that the tests prove (tests/functional/), and the words for a person.
_PROVED: dict[str, tuple[tuple[object, ...], str]] = {
    "context_parallel_size": ((1,), "context parallelism"),
    "expert_model_parallel_size": ((1,), "expert parallelism"),
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
}


def check_layout(config: TransformerConfig, checkpoint: Config) -> None:
    """Refuse a layout that no test proves for this family.

    Raises:
        VLBridgeError: naming every setting that is not proved, and what is.
    """
    faults = [
        f"{words}: {name}={getattr(config, name)!r}, proved: {' or '.join(map(repr, values))}"
        for name, (values, words) in _PROVED.items()
        if getattr(config, name, values[0]) not in values
    ]
    if faults:
        raise VLBridgeError(
            f"{checkpoint.architecture}: not proved equal to transformers, so it is refused:\n  " + "\n  ".join(faults)
        )
