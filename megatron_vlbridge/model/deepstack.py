"""Deepstack: image features of the tower's inner blocks, added to the outputs of the first decoder layers.

Features of level k `[n, 1, H]` are added to the vision tokens in the output of decoder layer k, both counted from 0
(Megatron's `layer_number` is k + 1). Megatron's block hands its `context` from layer to layer and through activation
recomputation; this model has no cross-attention, so `context` holds the features. Between pipeline stages, the features
that later stages need are appended to the hidden states along dim 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_vlbridge.backends.packed import PackedSegments
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.zigzag import pack_order
from megatron_vlbridge.model.inputs import PackedInputs
from megatron_vlbridge.model.transformer_config import deepstack_travels


@dataclass
class DeepstackSegments(PackedSegments):
    """`PackedSegments` with `vision_token_index` `[n]`: which of this rank's hidden states are vision tokens.

    `router_segments` is for routers with a loss of each segment, a conversation: see :class:`PackRouter`.
    """

    vision_token_index: torch.Tensor | None = None
    router_segments: tuple[torch.Tensor, int] | None = None


def packed_seq_params(
    inputs: PackedInputs, router_segments: tuple[torch.Tensor, int] | None = None
) -> DeepstackSegments:
    """The `packed_seq_params` of a pack: its segments for attention, its vision tokens for deepstack."""
    layout = inputs.layout
    order = pack_order(layout.segments, layout.cp_size) if layout.cp_size > 1 else None
    return DeepstackSegments.from_lengths(
        layout.segments,
        inputs.tokens.device,
        order,
        vision_token_index=inputs.deepstack_token_index,
        router_segments=router_segments,
    )


class DeepstackLayer(TransformerLayer):
    """A decoder layer k that adds the features of level k, if k < `levels`, to the vision tokens of its output.

    `context` `[m, n, 1, H]` holds the features of the last m levels, which is why they are counted from the end;
    `packed_seq_params` is a :class:`DeepstackSegments`.
    """

    def __init__(self, *args: Any, levels: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.levels = levels

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Same as Megatron's, see there."""
        if self.is_moe_layer:
            # Set in each forward: a layer that is recomputed must have the segments of its own micro-batch.
            self.mlp.router.segments = kwargs["packed_seq_params"].router_segments
        hidden_states, context = super().forward(*args, **kwargs)
        if context is not None and self.layer_number <= self.levels:
            features = context[self.layer_number - 1 - self.levels]
            index = kwargs["packed_seq_params"].vision_token_index
            hidden_states = hidden_states.index_add(0, index, features)
        return hidden_states, context


def local_features(
    features: torch.Tensor, inputs: PackedInputs, tp_group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Of the `features` `[levels, N, 1, H]` of all N vision tokens those of this rank's n: `[levels, n, 1, H]`.

    Under sequence parallelism (`inputs.shard`) each tensor-parallel rank adds a part of them, so their gradient is
    summed over the tensor-parallel ranks.
    """
    if inputs.shard is None:
        return features
    return copy_to_tensor_model_parallel_region(features, group=tp_group)[:, inputs.shard.embed_index]


def append_features(hidden_states: torch.Tensor, features: torch.Tensor, layers: int) -> torch.Tensor:
    """`hidden_states` `[s, 1, H]` of a stage with so many `layers`, then the `features` that later stages add."""
    rest = features[layers:]
    return torch.cat((hidden_states, rest.flatten(0, 1))) if len(rest) else hidden_states


def split_features(
    received: torch.Tensor, tokens: int, levels: int, images: int, stage: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[tokens, 1, H]` and features `[levels, images, 1, H]`, as the previous stage joined them.

    Raises VLBridgeError where `received` has another length.
    """
    if received.shape[0] != tokens + levels * images:
        raise VLBridgeError(
            f"pipeline stage {stage} received {received.shape[0]} rows, expected {tokens} tokens and {levels} x "
            f"{images} rows of deepstack features. Check that all stages read the same packs, and that the packs have "
            "the length that --seq-length gives the schedule"
        )
    return received[:tokens], received[tokens:].view(levels, images, *received.shape[1:])


def check_stages(config: TransformerConfig, hf_config: Config) -> None:
    """Require `variable_seq_lengths` where deepstack features cross pipeline stages (VLBridgeError)."""
    if deepstack_travels(config, hf_config) and not config.variable_seq_lengths:
        raise VLBridgeError(
            f"the first {len(hf_config.vision.deepstack_visual_indexes)} decoder layers add deepstack features and "
            "are on several pipeline stages, so the stages exchange tensors of varying length, which needs "
            "variable_seq_lengths. Make the model's config with language_config, which sets it"
        )
