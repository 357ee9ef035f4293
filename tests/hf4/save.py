"""A small checkpoint as whichever transformers is installed saves it: `python -m tests.hf4.save FOLDER KIND [tied]`."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.unit.test_convert import ROPE, TEXT, TOKENS, VISION

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
THETA = 10_000.0  # neither version's default


def save(folder: Path, kind: str, tied: bool) -> Path:
    """Random bfloat16 weights, `dense` or with `experts`, in several shards."""
    of = {"dense": "Qwen3VL", "experts": "Qwen3VLMoe"}[kind]
    text: dict[str, Any] = {key: value for key, value in TEXT.items() if key != "rope_parameters"}
    rope = {key: value for key, value in ROPE.items() if key != "rope_theta"}
    if transformers.__version__.startswith("4."):  # the base is beside the other parameters of the rotary embedding
        text |= {"rope_theta": THETA, "rope_scaling": rope}
    else:
        text["rope_parameters"] = {**rope, "rope_theta": THETA}
    # The published files say it in both places; 4.57 reads the text's.
    text |= (EXPERTS if kind == "experts" else {}) | {"tie_word_embeddings": tied}
    config = getattr(transformers, f"{of}Config")(
        text_config=text, vision_config=VISION, tie_word_embeddings=tied, **TOKENS
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{of}ForConditionalGeneration")(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


if __name__ == "__main__":
    save(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["tied"])
