"""The texts of tokens, fast where the decoder is `ByteLevel`: the bytes of each token are looked up, and joined."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def token_texts(rows: Sequence[NDArray[np.int64]], tokenizer: Any) -> list[str]:
    """The texts that the tokenizer decodes from each `[L]`, special tokens included and spaces left as they are.

    Example: `token_texts([np.array(tokenizer.encode("A cat."))], tokenizer)` is `["A cat."]`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not rows or backend is None or not isinstance(backend.decoder, ByteLevel):
        return [tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in rows]
    pieces = _token_bytes(tokenizer, len(tokenizer)).of(np.concatenate(rows))
    texts, start = [], 0
    for row in rows:
        texts.append(b"".join(pieces[start : start + len(row)]).decode(errors="replace"))
        start += len(row)
    return texts


class _TokenBytes:
    """The bytes of the tokens of a byte-level tokenizer, each looked up when it is first needed."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        size = max(tokenizer.get_vocab().values()) + 1  # there may be fewer tokens, with gaps between
        self._bytes = np.empty(size, object)
        self._known = np.zeros(size, bool)

    def of(self, ids: NDArray[np.int64]) -> list[bytes]:
        for index in np.unique(ids[~self._known[ids]]).tolist():
            self._bytes[index] = self._look_up(index)
            self._known[index] = True
        pieces: list[bytes] = self._bytes[ids].tolist()
        return pieces

    def _look_up(self, index: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(index)
        # Added tokens are written as they are.
        known = all(character in _BYTES for character in token)
        return bytes(map(_BYTES.__getitem__, token)) if known else token.encode()


# Of each tokenizer and number of its tokens: others may be added.
@lru_cache(maxsize=16)
def _token_bytes(tokenizer: Any, _tokens: int) -> _TokenBytes:
    return _TokenBytes(tokenizer)
