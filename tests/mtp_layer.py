"""transformers' MTP layer after a model of transformers, its parameters under their names in a checkpoint."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

# transformers' names of the layer's parts, and those in a checkpoint.
_PARTS = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
    "mtp_block": "layers.0",
    "post_norm": "norm",
}


class SubstituteLayer(torch.nn.Module):
    """What transformers' `MtpLayer` computes, with its parts; the oldest supported version has no such class."""

    def __init__(self, config: Any, layer_class: Any, norm_class: Any, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = norm_class(hidden, eps=eps), norm_class(hidden, eps=eps)
        self.eh_proj = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.mtp_block = layer_class(config, index)
        self.post_norm = norm_class(hidden, eps=eps)

    def forward(self, words: torch.Tensor, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        """As of transformers' layer."""
        joined = torch.cat((self.enorm(words), self.hnorm(hidden)), dim=-1)
        return self.post_norm(self.mtp_block(self.eh_proj(joined), **options))


def build(model: Any, layer: Any = None) -> torch.nn.Module:
    """The MTP layer for a model, of this class or transformers' own, without weights."""
    from transformers import modeling_layers

    decoder = model.model.language_model
    config = copy.deepcopy(decoder.config)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    make = layer or getattr(modeling_layers, "MtpLayer", SubstituteLayer)
    return make(config, type(decoder.layers[0]), type(decoder.norm), 0)


def run(
    layer: torch.nn.Module, next_words: torch.Tensor, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Normed hidden states `[1, S, H]` from the embeddings of the next tokens and the decoder's normed output."""
    unused = {"attention_mask": None, "position_ids": None, "past_key_values": None}  # without a mask it is causal
    return layer(next_words, hidden, position_embeddings=rotary, **unused)


def parameters(layer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The layer's parameters under their names in a checkpoint."""
    parts = ((name.partition("."), parameter) for name, parameter in layer.named_parameters())
    return {f"mtp.{_PARTS[part]}.{rest}": parameter for (part, _, rest), parameter in parts}


@torch.no_grad()
def load(layer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the layer from a checkpoint's tensors, which must be exactly its parameters."""
    found = parameters(layer)
    assert found.keys() == tensors.keys()
    for name, parameter in found.items():
        parameter.copy_(tensors[name])
