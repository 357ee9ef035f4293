"""What the demo starts from: a small Qwen3-VL with random weights."""

import re
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from megatron_vlbridge.demo.digits import ASK_ONE, ASK_TWO, WORDS
from megatron_vlbridge.demo.tiny_processor import TEMPORAL_PATCH_SIZE, build_processor

IMAGE_SIZE = 32
PATCH_SIZE, MERGE_SIZE = 8, 2
# A multiple of 128 times each tensor-parallel size up to 4, so that Megatron adds no rows.
VOCAB_SIZE = 512


def write_checkpoint(folder: Path, seed: int) -> int:
    """Write a Hugging Face checkpoint (fp32, with its processor) of random weights; the number of its parameters.

    Everything that Qwen3-VL has, only small: grouped-query attention with q/k norms, interleaved MRoPE, a vision tower
    whose deepstack levels enter the first decoder layers, and a head tied to the embedding.
    """
    words = [*WORDS, *re.findall(r"\w+", f"{ASK_ONE} {ASK_TWO}")]
    pixels = IMAGE_SIZE**2
    processor = build_processor(
        words, patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, min_pixels=pixels, max_pixels=pixels
    )
    tokenizer = processor.tokenizer
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "out_hidden_size": 128,
            "num_position_embeddings": (IMAGE_SIZE // PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
