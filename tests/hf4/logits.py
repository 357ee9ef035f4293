"""The logits of a checkpoint by whichever transformers is installed: `python -m tests.hf4.logits FOLDER FILE`."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

IMAGE, START, END = 10, 8, 9
GRID = (1, 4, 4)


def load(folder: Path) -> torch.nn.Module:
    """The model in float32; refuses a checkpoint that has not exactly its tensors."""
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if (names := info[kind])}
    assert not wrong, wrong
    return model.eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """`[T, V]` of a sentence with a picture."""
    torch.manual_seed(1)
    ids = torch.tensor([[1, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 5, 6, 7]])
    inputs: dict[str, Any] = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([GRID])}
    # Without a mask 4.57 takes the equal positions of a picture's tokens for the starts of packed sequences.
    inputs["attention_mask"] = torch.ones_like(ids)
    if int(transformers.__version__.split(".")[0]) > 4:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return load(folder)(input_ids=ids, use_cache=False, **inputs).logits[0]


if __name__ == "__main__":
    torch.save(logits(Path(sys.argv[1])), sys.argv[2])
