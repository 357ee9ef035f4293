"""Write a small Qwen3-VL or Qwen3.5 with a processor, and conversations about digits."""

import json
from pathlib import Path

import torch


def write(folder: Path, conversations: int = 48, experts: bool = False, linear: bool = False) -> Path:
    """Write `folder/hf` (random weights, processor) and `folder/train.jsonl` with its images."""
    import transformers

    from megatron_vlbridge.demo import digits
    from megatron_vlbridge.demo.tiny_processor import build_processor

    processor = build_processor(digits.WORDS, patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=32 * 32)
    ids = {
        f"{name}_id": processor.tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token", "<|image_pad|>"),
            ("video_token", "<|video_pad|>"),
            ("vision_start_token", "<|vision_start|>"),
            ("vision_end_token", "<|vision_end|>"),
        )
    }
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    kind = ("Qwen3_5" if linear else "Qwen3VL") + ("Moe" if experts else "")
    size = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if experts else {}
    if linear:
        rope |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        # transformers 5.8 saves the factor here too, with the default of the class if it is not given.
        heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "partial_rotary_factor": 0.5}
        size |= heads | {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
    deepstack = {} if linear else {"deepstack_visual_indexes": [0, 1]}
    config = getattr(transformers, f"{kind}Config")(
        text_config={
            **size,
            "vocab_size": 333,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            **deepstack,
        },
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().save_pretrained(folder / "hf")
    processor.save_pretrained(folder / "hf")
    scans = digits.load_scans(32)[: conversations * 2]
    with (folder / "train.jsonl").open("w") as lines:
        for index in range(conversations):
            shown = scans[2 * index : 2 * index + 1 + index % 2]
            messages = digits.conversation_about(*shown)
            for message in messages:
                if not isinstance(message["content"], str):
                    for position, part in enumerate(message["content"]):
                        if part["type"] == "image":
                            path = f"{index}-{position}.png"
                            part["image"].save(folder / path)
                            part["image"] = path
            lines.write(json.dumps({"messages": messages}) + "\n")
    return folder
