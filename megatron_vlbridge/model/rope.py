"""Rotary embeddings with several position axes (interleaved MRoPE for text, rows and columns for images), applied."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention


def mrope_axes(mrope_section: Sequence[int]) -> list[int]:
    """Which position axis (0 time, 1 row, 2 column) turns each frequency of interleaved MRoPE.

    Frequency j is turned by the row where j % 3 == 1, by the column where j % 3 == 2, up to three times the axis's
    section, and by time everywhere else. Source: `apply_interleaved_mrope` of transformers' `modeling_qwen3_vl.py`.

    Example: `mrope_axes([3, 3, 2])` is `[0, 1, 2, 0, 1, 2, 0, 1]`.
    """
    axes = [0] * sum(mrope_section)
    for axis in (1, 2):
        for j in range(axis, min(3 * mrope_section[axis], len(axes)), 3):
            axes[j] = axis
    return axes


def inverse_frequencies(count: int, theta: float, device: torch.device) -> torch.Tensor:
    """`theta ** (-j / count)` for j < count, fp32 `[count]`."""
    exponents = torch.arange(0, 2 * count, 2, dtype=torch.int64, device=device).float() / (2 * count)
    return 1.0 / theta**exponents


def rotary_table(positions: torch.Tensor, axes: Sequence[int], frequencies: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of each token: fp32 `[2, T, 1, 2 * len(axes)]`.

    Takes `positions` `[axes, T]`, the axis of each frequency, and the frequencies `[len(axes)]`. The table is made in
    fp32 for every batch and is no buffer of a module, so that no cast of the model's weights can round it.
    """
    # Indexing with a list would wait until the list has come to the device.
    which = torch.tensor(axes).to(positions.device, non_blocking=True)
    angles = positions[which].T.float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return torch.stack((angles.cos(), angles.sin()))


def rotate(heads: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the first `n` dims of `heads` `[T, ..., heads, dim]` by `table` `[2, T, 1, n]`.

    In fp32, returned in the dtype of `heads`.
    """
    cos, sin = table.view(2, table.shape[1], *(1,) * (heads.dim() - 2), table.shape[-1])
    part, rest = heads.tensor_split((table.shape[-1],), dim=-1)
    first, second = part.float().chunk(2, dim=-1)
    turned = part.float() * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(heads.dtype), rest), dim=-1)


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention, with `rotary_pos_emb` a table of :func:`rotary_table`.

    Megatron-Core's own rotation of a pack syncs with the device for every segment's length, in every layer, and has
    neither interleaved MRoPE nor image positions. Here the table already holds this rank's tokens.
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
        """Query, key, value (and the output gate, where there is one) after q/k norm and rotation."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        assert self._rotary_table is not None
        return (rotate(query, self._rotary_table), rotate(key, self._rotary_table), *rest)
