"""What Megatron's schedules and other frameworks look for on the outer model."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import get_mtp_layer_offset

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model import deepstack
from megatron_vlbridge.model.inputs import PackedInputs


class Stage(MegatronModule):
    """A pipeline stage around a `language_model`, whose decoder and head are found, and the head set, on it.

    Example: `model.output_layer = value_head`, as critics do, replaces the language model's head.
    """

    language_model: Any
    pg_collection: Any
    vp_stage: int | None
    _remaining_levels: int
    _received: torch.Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # A module that is set would be registered here, beside the head that is used.
        if name == "output_layer":
            self.language_model.output_layer = value
        else:
            super().__setattr__(name, value)

    @property
    def decoder(self) -> Any:
        """The language model's decoder."""
        return self.language_model.decoder

    @property
    def output_layer(self) -> Any:
        """The language model's head, on the last stage."""
        return self.language_model.output_layer

    @property
    def received(self) -> torch.Tensor | None:
        """What the next forward takes from the previous stage."""
        return self._received

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Takes the previous stage's output from Megatron's schedules."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The tied weight of this stage, whose gradient Megatron sums over the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def receive(self, inputs: PackedInputs) -> torch.Tensor:
        """The previous stage's hidden states go to the decoder; gives its deepstack features `[levels, n, 1, H]`."""
        received, self._received = self._received, None
        if received is None:
            raise VLBridgeError("a stage without embeddings needs the hidden states of the previous one")
        tokens = inputs.tokens.shape[1] // (1 if inputs.shard is None else self.pg_collection.tp.size())
        # Where an earlier stage ran the MTP layer, its hidden states follow those of the decoder.
        tokens *= 1 + get_mtp_layer_offset(self.config, self.vp_stage)
        n, stage = len(inputs.deepstack_token_index), self.pg_collection.pp.rank()
        hidden_states, features = deepstack.split_features(received, tokens, self._remaining_levels, n, stage)
        self.language_model.decoder.set_input_tensor(hidden_states)
        return features
