"""Self-attention that turns queries and keys by a ready-made rotary table."""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention

from megatron_vlbridge.model.rope import rotate


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention, with `rotary_pos_emb` a table of :func:`~megatron_vlbridge.model.rope.rotary_table`.

    Megatron-Core's own rotation of a pack asks the device for every segment's length, in every layer, and knows
    neither interleaved MRoPE nor picture positions. Here the table already holds this rank's tokens.
    """

    _rotary_table: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Same as Megatron's, see there; `rotary_pos_emb` is the table."""
        self._rotary_table = kwargs.pop("rotary_pos_emb")
        try:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        finally:
            self._rotary_table = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Query, key and value after q/k norm and rotation."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        assert self._rotary_table is not None
        return (rotate(query, self._rotary_table), rotate(key, self._rotary_table), *rest)
