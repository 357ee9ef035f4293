"""Layer specs: which Megatron modules make a layer, with the kernels of a backend."""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vlbridge.model.attention import RotarySelfAttention
from megatron_vlbridge.model.router import PackRouter

# Backends that fuse the norms into the linears name them there; checkpoints use those names for every backend.
_FUSED_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def layer_spec(
    backend: BackendSpecProvider,
    config: TransformerConfig,
    attn_mask_type: AttnMaskType,
    layer: type[TransformerLayer] = TransformerLayer,
    experts: bool = False,
) -> ModuleSpec:
    """A pre-norm layer of `backend`: attention (causal or bidirectional), then a dense MLP or a router and experts."""
    rms_norm = config.normalization == "RMSNorm"
    fused = backend.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else backend.layer_norm(rms_norm=rms_norm)
    qk_norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True) if config.qk_layernorm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=RotarySelfAttention, params={"attn_mask_type": attn_mask_type}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            # No linear follows this norm directly where there are experts.
            pre_mlp_layernorm=backend.layer_norm(rms_norm=rms_norm) if experts else norm,
            mlp=_expert_spec(backend) if experts else _mlp_spec(backend),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                ours: fused_name
                for ours, fused_name in _FUSED_NORM_NAMES.items()
                if not fused and not (experts and "mlp" in ours)
            },
        ),
    )


def _mlp_spec(backend: BackendSpecProvider) -> Any:
    """A dense MLP; its norm is part of the first linear where the backend fuses them."""
    fused = backend.fuse_layernorm_and_linear()
    submodules = MLPSubmodules(
        linear_fc1=backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear(),
        linear_fc2=backend.row_parallel_linear(),
    )
    return partial(MLP.as_mlp_submodule, submodules=submodules)


def _expert_spec(backend: BackendSpecProvider) -> Any:
    """Megatron's experts (grouped where the backend has such) after a :class:`PackRouter`."""
    experts = backend.grouped_mlp_modules(moe_use_grouped_gemm=True)
    return partial(MoELayer, submodules=MoESubmodules(experts=experts, router=PackRouter))


def block_spec(
    backend: BackendSpecProvider, config: TransformerConfig, layers: list[ModuleSpec]
) -> TransformerBlockSubmodules:
    """These layers and the final norm."""
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
