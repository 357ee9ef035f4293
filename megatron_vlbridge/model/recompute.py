"""Activation recomputation where a part of the model is frozen."""

import torch
from megatron.core.transformer.module import MegatronModule


def recomputable(hidden_states: torch.Tensor, block: MegatronModule) -> torch.Tensor:
    """The input of `block`, asking for a gradient where the block's trainable layers are recomputed.

    Recomputed layers get gradients only if their input asks for one. After frozen embeddings it does not, and Megatron
    would silently leave every parameter of the block without a gradient.
    """
    recomputed = block.config.recompute_granularity is not None
    if not recomputed or hidden_states.requires_grad or not torch.is_grad_enabled():
        return hidden_states
    if not any(parameter.requires_grad for parameter in block.parameters()):
        return hidden_states
    return hidden_states.detach().requires_grad_()
