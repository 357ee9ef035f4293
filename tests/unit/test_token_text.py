"""The texts of tokens, with `decode` of the tokenizers as the oracle."""

import functools
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel, Metaspace
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from megatron_vlbridge.data.labels.token_text import token_texts
from tests.published_tokenizer import CLASSES, build_tokenizer

tokenizer_of = functools.cache(build_tokenizer)


def rows_of(tokens: int, seed: int) -> list[np.ndarray]:
    """Random tokens, most of which are no whole characters together."""
    random = np.random.default_rng(seed)
    return [random.integers(0, tokens, int(size)) for size in random.integers(0, 40, 300)]


def decoded(rows: list[np.ndarray], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in rows]


@pytest.mark.parametrize("name", CLASSES)
def test_random_tokens_have_the_texts_of_decode(name: str) -> None:
    tokenizer = tokenizer_of(name)
    # The tokens of single bytes come first, the added ones last.
    for seed, high in enumerate((256, len(tokenizer))):
        rows = rows_of(high, seed)
        assert token_texts(rows, tokenizer) == decoded(rows, tokenizer)
    special = [np.arange(len(tokenizer) - 30, len(tokenizer))]
    assert token_texts(special, tokenizer) == decoded(special, tokenizer)


def test_tokens_added_later_are_known() -> None:
    tokenizer = build_tokenizer()
    row = [np.array(tokenizer.encode("A cat."))]
    assert token_texts(row, tokenizer) == ["A cat."]
    for text in ("<a b>", "<日本>", "<é>"):
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=True)])
        row = [np.array(tokenizer.encode(f"A {text} cat."))]
        assert token_texts(row, tokenizer) == decoded(row, tokenizer)


def test_ids_may_have_gaps() -> None:
    backend = Tokenizer(BPE({"a": 0, "Ġ": 1, "b": 4000}, []))
    backend.decoder = ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    rows = [np.array([0, 1, 4000, 4000])]
    assert token_texts(rows, tokenizer) == decoded(rows, tokenizer) == ["a bb"]


def test_a_tokenizer_that_is_not_byte_level_decodes() -> None:
    backend = Tokenizer(Unigram([("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -1.0), (".", -1.0), ("é", -1.0)], unk_id=0))
    backend.decoder = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    rows = [np.array([1, 2, 3]), np.array([4, 2])]
    assert token_texts(rows, tokenizer) == ["a cat.", "é cat"]


def test_no_rows_have_no_texts() -> None:
    assert token_texts([], tokenizer_of()) == []
