"""What Megatron's schedules and other frameworks look for on the outer model."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule


class Stage(MegatronModule):
    """A pipeline stage around a `language_model`, whose decoder and head are found, and the head set, on it.

    Example: `model.output_layer = value_head`, as critics do, replaces the language model's head.
    """

    language_model: Any
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
