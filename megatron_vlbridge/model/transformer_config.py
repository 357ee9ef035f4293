"""`Config` -> Megatron `TransformerConfig`, for the language model and for the vision tower."""

import dataclasses
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge import families
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError

# The tower lives whole on the first pipeline stage and is not cut by context parallelism.
_TOWER: dict[str, Any] = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "variable_seq_lengths": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "moe_grouped_gemm": False,
}
# Of `recompute_modules`. Its layers have neither experts nor linear attention; and with `mlp` Megatron-Core 0.19 gives
# the parameter of a bias, which its MLPs have, the checkpoint as history, whose backward then calls itself.
_TOWER_MODULES = ("core_attn", "layernorm")


def language_config(config: Config, base: TransformerConfig | None = None, **overrides: Any) -> TransformerConfig:
    """The language model's `TransformerConfig`: the checkpoint's fields over `base` (parallel sizes, precision, ...).

    Without `base` the loss is averaged over tokens (`calculate_per_token_loss`), the only average that is supported.

    Example: `language_config(read_config("Qwen3-VL-2B-Instruct"), tensor_model_parallel_size=2)`.
    """
    asked = 0 if base is None else base.mtp_num_layers or 0
    if asked not in (0, config.text.num_mtp_layers):
        raise VLBridgeError(
            f"mtp_num_layers: expected {config.text.num_mtp_layers}, as the checkpoint's config says, found {asked}. "
            "Leave it out: it is read from the checkpoint"
        )
    sizes = [
        overrides.get(name, getattr(base, name, 1)) for name in ("tensor_model_parallel_size", "context_parallel_size")
    ]
    if fault := linear_attention_fault(config, *sizes):
        raise VLBridgeError(fault)
    loss = {"calculate_per_token_loss": True} if base is None else {}
    built = _over(base, loss | families.find(config).language_fields(config) | overrides)
    if deepstack_travels(built, config):
        if built.num_moe_experts and built.moe_token_dispatcher_type == "allgather":
            raise VLBridgeError(
                "the layers that take deepstack features are on several pipeline stages, which needs hidden states of "
                "changing length, and Megatron's all-gather dispatcher of tokens to experts takes none. "
                "Use --moe-token-dispatcher-type alltoall, or give the first stage "
                f"{len(config.vision.deepstack_visual_indexes)} layers"
            )
        built.variable_seq_lengths = True
        if not built.num_moe_experts:
            # Megatron asks for it all the same.
            built.moe_token_dispatcher_type = "alltoall"
    return built


def linear_attention_fault(config: Config, tp: int, cp: int) -> str | None:
    """Why linear attention cannot be spread over these tensor- and context-parallel sizes; None where it can."""
    heads = config.text.num_linear_key_heads
    if not heads % (tp * cp):
        return None
    divisors = ", ".join(str(size) for size in range(1, heads + 1) if not heads % size)
    return (
        f"tensor-parallel size {tp} x context-parallel size {cp} = {tp * cp} does not divide the {heads} key heads of "
        f"linear attention, which these ranks share; use sizes whose product is one of {divisors}"
    )


def deepstack_travels(language: TransformerConfig, config: Config) -> bool:
    """Whether layers that take deepstack features are after the first (virtual) pipeline stage."""
    if language.pipeline_model_parallel_size == 1:
        return False
    if language.pipeline_model_parallel_layout is not None:
        first = language.pipeline_model_parallel_layout.layout[0][0].count(LayerType.decoder)
    else:
        first = get_num_layers_to_build(language, vp_stage=0, pp_rank=0)
    return bool(first < len(config.vision.deepstack_visual_indexes))


def vision_config(config: Config, language: TransformerConfig) -> TransformerConfig:
    """The vision tower's `TransformerConfig`: the checkpoint's fields over the language model's.

    Fields that only the text part decides get Megatron's defaults.
    """
    family = families.find(config)
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    of_text = {name: defaults[name] for name in family.language_fields(config)}
    fields = of_text | family.vision_fields(config) | _TOWER
    fields["recompute_modules"] = [name for name in language.recompute_modules or () if name in _TOWER_MODULES]
    if language.recompute_method == "uniform":
        # Deepstack features are taken between layers, which recomputed groups of several layers do not give.
        fields["recompute_num_layers"] = 1
    return _over(language, fields)


def _over(base: TransformerConfig | None, fields: dict[str, Any]) -> TransformerConfig:
    if base is None:
        return TransformerConfig(**fields)
    # Made again for this part's own standard deviation and depth.
    initializers = {"init_method": None, "output_layer_init_method": None, "embedding_init_method": None}
    return dataclasses.replace(base, **{**initializers, **fields})
