"""Layer specs: which Megatron modules make a layer, with the kernels of a backend."""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vlbridge.config import LayerKind
from megatron_vlbridge.model.linear_attention import LinearAttention, OutputNorm
from megatron_vlbridge.model.rope import RotarySelfAttention
from megatron_vlbridge.model.router import PackRouter

_PLAIN = LayerKind()


def layer_spec(
    backend: BackendSpecProvider,
    config: TransformerConfig,
    attn_mask_type: AttnMaskType,
    kind: LayerKind = _PLAIN,
    layer: type[TransformerLayer] = TransformerLayer,
) -> ModuleSpec:
    """A pre-norm layer of `backend`: attention (causal or bidirectional), then a dense MLP or a router and experts."""
    rms_norm = config.normalization == "RMSNorm"
    fused = backend.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else backend.layer_norm(rms_norm=rms_norm)
    linear = kind.linear_attention
    # Backends that fuse the norms into the linears name them there; checkpoints use those names for every backend.
    fused_names = {"input_layernorm.": f"self_attention.{'in_proj' if linear else 'linear_qkv'}.layer_norm_"}
    if not kind.experts:
        fused_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_linear_spec(backend) if linear else _attention_spec(backend, config, attn_mask_type),
            self_attn_bda=get_bias_dropout_add,
            # No linear follows this norm directly where there are experts.
            pre_mlp_layernorm=backend.layer_norm(rms_norm=rms_norm) if kind.experts else norm,
            mlp=_expert_spec(backend) if kind.experts else _mlp_spec(backend),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else fused_names,
        ),
    )


def _attention_spec(
    backend: BackendSpecProvider, config: TransformerConfig, attn_mask_type: AttnMaskType
) -> ModuleSpec:
    rms_norm = config.normalization == "RMSNorm"
    qk_norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True) if config.qk_layernorm else None
    return ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": attn_mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=_norm_linear(backend),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _linear_spec(backend: BackendSpecProvider) -> ModuleSpec:
    return ModuleSpec(
        module=LinearAttention,
        submodules=GatedDeltaNetSubmodules(
            in_proj=_norm_linear(backend), out_norm=OutputNorm, out_proj=backend.row_parallel_linear()
        ),
    )


def _norm_linear(backend: BackendSpecProvider) -> Any:
    """A column-parallel linear, with the norm before it where the backend fuses them."""
    if backend.fuse_layernorm_and_linear():
        return backend.column_parallel_layer_norm_linear()
    return backend.column_parallel_linear()


def _mlp_spec(backend: BackendSpecProvider) -> Any:
    submodules = MLPSubmodules(linear_fc1=_norm_linear(backend), linear_fc2=backend.row_parallel_linear())
    return partial(MLP.as_mlp_submodule, submodules=submodules)


def _expert_spec(backend: BackendSpecProvider) -> Any:
    """Megatron's experts (grouped where the backend has such) after a :class:`PackRouter`, and a shared expert."""
    linears = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    return partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=backend.grouped_mlp_modules(moe_use_grouped_gemm=True),
            # Built only where the config gives its size.
            shared_experts=partial(SharedExpertMLP, submodules=linears),
            router=PackRouter,
        ),
    )


def block_spec(
    backend: BackendSpecProvider, config: TransformerConfig, layers: list[ModuleSpec]
) -> TransformerBlockSubmodules:
    """These layers and the final norm."""
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
