"""The texts of tokens, fast where the decoder is `ByteLevel`: the bytes of all tokens are in one array."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
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
    table = _token_bytes(tokenizer, len(tokenizer))
    ids = np.concatenate(rows)
    sizes = table.sizes[ids]
    ends = np.cumsum(sizes, dtype=np.int32)
    total = int(ends[-1]) if len(ends) else 0
    places = np.repeat(table.starts[ids] - (ends - sizes), sizes) + np.arange(total, dtype=np.int32)
    data = table.data[places].tobytes()
    ends_of_rows = np.concatenate([[0], ends])[list(accumulate(map(len, rows), initial=0))].tolist()
    return [data[start:end].decode(errors="replace") for start, end in pairwise(ends_of_rows)]


class _TokenBytes:
    """The bytes of a byte-level tokenizer's tokens: those of token i are `data[starts[i] : starts[i] + sizes[i]]`."""

    def __init__(self, tokenizer: Any) -> None:
        tokens = {index: _bytes(token) for token, index in tokenizer.get_vocab().items()}
        pieces = [tokens.get(index, b"") for index in range(max(tokens) + 1)]
        self.data = np.frombuffer(b"".join(pieces), np.uint8)
        self.sizes = np.array([*map(len, pieces)], np.int32)
        self.starts = np.cumsum(self.sizes, dtype=np.int32) - self.sizes


def _bytes(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:  # added tokens are written as they are
        return token.encode()


# Of each tokenizer and number of its tokens: others may be added.
@lru_cache(maxsize=16)
def _token_bytes(tokenizer: Any, _tokens: int) -> _TokenBytes:
    return _TokenBytes(tokenizer)
