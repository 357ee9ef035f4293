"""Tokens of texts with runs of placeholders: a run, which can be of thousands, is tokenized as one and repeated."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_vlbridge.errors import VLBridgeError

# They would count the tokens of the shortened text.
_LENGTHS = frozenset({"truncation", "max_length", "stride"})


def encode_runs(text: str, tokenizer: Any, placeholders: Sequence[str], **settings: Any) -> Tensor:
    """The tokens of a text, int64 `[L]`; `placeholders` are special tokens, `settings` are those of the tokenizer.

    It is never truncated, whatever the settings or a `tokenizer.json` say.

    Raises VLBridgeError: a placeholder is not one token everywhere in the text.
    Example: `encode_runs("<|image_pad|><|image_pad|>A cat.", tokenizer, ["<|image_pad|>"])`.
    """
    counts: list[int] = []

    def shorten(match: re.Match[str]) -> str:
        token = next(token for token in placeholders if match[0].startswith(token))
        counts.append(len(match[0]) // len(token))
        return token

    short = re.sub("|".join(f"(?:{re.escape(token)})++" for token in placeholders), shorten, text)
    settings = {name: value for name, value in settings.items() if name not in _LENGTHS}
    ids = np.array(tokenizer(short, truncation=False, **settings)["input_ids"], np.int64)
    repeated = np.logical_or.reduce([ids == one for one in tokenizer.convert_tokens_to_ids(list(placeholders))])
    if np.count_nonzero(repeated) != len(counts):
        raise VLBridgeError(
            f"tokenizer: expected one token for each of {len(counts)} runs of {', '.join(placeholders)}, found "
            f"{np.count_nonzero(repeated)}. Use the tokenizer of the checkpoint, in which these are special tokens."
        )
    repeats = np.ones(len(ids), np.int64)
    repeats[repeated] = counts
    return torch.from_numpy(np.repeat(ids, repeats))


class RunTokenizer:
    """A tokenizer for a processor of transformers, which tokenizes as `encode_runs`."""

    def __init__(self, tokenizer: Any, placeholders: Sequence[str]) -> None:
        self._tokenizer, self._placeholders = tokenizer, placeholders

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(
        self, texts: Sequence[str], *, padding: bool = False, return_tensors: str | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Tokens and attention mask `[B, S]` of the texts, padded on the right, as tensors or lists."""
        rows = [encode_runs(text, self._tokenizer, self._placeholders, **settings) for text in texts]
        encoded = {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }
        return encoded if return_tensors else {name: tensor.tolist() for name, tensor in encoded.items()}
