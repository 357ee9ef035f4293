"""What the demo starts from: a small model of a family with random weights."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_vlbridge.demo.digits import ASK_ONE, ASK_TWO, ASK_VIDEO, WORDS
from megatron_vlbridge.demo.tiny_processor import TEMPORAL_PATCH_SIZE, build_processor
from megatron_vlbridge.families import find, read_config

IMAGE_SIZE = 32
PATCH_SIZE, MERGE_SIZE = 8, 2
# A multiple of 128 times each tensor-parallel size up to 4, so that Megatron adds no rows.
VOCAB_SIZE = 512

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
# Three layers of linear attention and one of full attention, which rotates half of each head; an MTP layer.
_LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mtp_num_hidden_layers": 1,
}
# Of each family its name, the prefix of transformers' classes, and fields of the text config.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_vl": ("Qwen3-VL", "Qwen3VL", {}),
    "qwen3_vl_moe": ("Qwen3-VL-MoE", "Qwen3VLMoe", _EXPERTS),
    "qwen3_5": ("Qwen3.5", "Qwen3_5", _LINEAR),
    "qwen3_5_moe": ("Qwen3.5-MoE", "Qwen3_5Moe", _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 128}),
}


def write_checkpoint(folder: Path, seed: int, family: str = "qwen3_vl") -> int:
    """Write a Hugging Face checkpoint (fp32, with its processor) of random weights; the number of its parameters.

    Everything that the family has, only small: grouped-query attention with q/k norms, interleaved MRoPE, a head tied
    to the embedding; Qwen3-VL's deepstack levels enter the first decoder layers.
    """
    words = [*WORDS, *re.findall(r"\w+", f"{ASK_ONE} {ASK_TWO} {ASK_VIDEO}")]
    pixels = IMAGE_SIZE**2
    processor = build_processor(
        words, patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, min_pixels=pixels, max_pixels=pixels
    )
    tokenizer = processor.tokenizer
    _, prefix, fields = FAMILIES[family]
    linear = "linear_num_key_heads" in fields
    config = getattr(transformers, f"{prefix}Config")(
        text_config=_text_fields(linear) | fields,
        vision_config=_vision_fields() | ({} if linear else {"deepstack_visual_indexes": [0, 1]}),
        tie_word_embeddings=True,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, save_original_format=False)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters()) + _add_mtp_layer(folder)


def _text_fields(linear: bool) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_interleaved": True}
    part = {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.5} if linear else {"mrope_section": [6, 5, 5]}
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": rope | part,
    }


def _vision_fields() -> dict[str, Any]:
    return {
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
    }


def _add_mtp_layer(folder: Path) -> int:
    """Write the tensors of the MTP layer, which transformers has no part for; the number of their elements."""
    config = read_config(folder)
    shapes = find(config).table(config).hf_shapes
    file = folder / "model.safetensors"
    tensors = {
        # The norms of this family are zero-centered.
        name: torch.zeros(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
        for name, shape in shapes.items()
        if name.startswith("mtp.")
    }
    if tensors:
        save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return sum(x.numel() for x in tensors.values())
