"""The code in docs/training.md for a model outside a pretrain script, run unchanged."""

import re
from pathlib import Path
from typing import Any

import torch

from tests import reference
from tests.functional.pool import Layout, Pool

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def documented_recipe() -> str:
    """The code on the page."""
    (code,) = re.findall(r"^A model outside a pretrain script.*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return code


def run_recipe(layout: Layout, folder: Path, code: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits that the code computes, with `batch` as the output of the processor."""
    names: dict[str, Any] = {"folder": folder, "text": "", "image": None, "processor": lambda **_: batch}
    exec(code, names)
    return names["logits"].detach()


def test_the_recipe_gives_the_logits_of_transformers(pool: Pool, tmp_path: Path) -> None:
    folder = reference.write_checkpoint(tmp_path)
    conversation = reference.conversation("image", 1)
    batch = {
        "input_ids": conversation.tokens[None],
        "attention_mask": torch.ones_like(conversation.tokens[None]),
        "pixel_values": conversation.images,
        "image_grid_thw": conversation.image_grids,
    }
    code = documented_recipe()
    assert "check_layout(" in code
    results = pool.run(run_recipe, Layout(tp=2, world=2), folder=folder, code=code, batch=batch)
    logits = torch.cat(results, dim=-1)[0]
    expected = reference.run_transformers(folder, [conversation]).logits[0]
    assert reference.relative_error(logits, expected) < 1e-5
