"""Another computation in the place of the head and the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule


@dataclass(frozen=True)
class OutputProcessor:
    """A function of a caller that makes the output of the last stage, called with the keywords of Megatron's hook.

    `arguments` are those of the call that Megatron passes on as they are. Source: `GPTModel._postprocess` of
    Megatron-Core 0.19.

    Example: `OutputProcessor(lambda *, hidden_states, **rest: hidden_states, None, {})`.
    """

    function: Callable[..., Any]
    context: Any
    arguments: Mapping[str, Any]

    def run(self, model: LanguageModule, hidden_states: torch.Tensor) -> Any:
        """What the function makes of `hidden_states` `[s, 1, H]`, a part of them under sequence parallelism."""
        tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        return self.function(
            hidden_states=hidden_states,
            output_layer=model.output_layer,
            output_weight=tied,
            **self.arguments,
            decoder_input=None,
            inference_context=None,
            runtime_gather_output=None,
            context=self.context,
            compute_language_model_loss=model.compute_language_model_loss,
            scale_logits=_unscaled,
            config=model.config,
        )


def _unscaled(logits: torch.Tensor) -> torch.Tensor:
    return logits
