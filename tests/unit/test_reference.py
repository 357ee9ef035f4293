"""What the oracle runs of transformers."""

from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from tests import reference


@pytest.mark.parametrize("kind", ["linear", "linear-experts"])
def test_qwen3_5_is_run_token_by_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """The gradients of transformers' chunked rule are not exact enough; afterwards it is there again."""

    def chunked(*_: Any, **__: Any) -> None:
        pytest.fail("the chunked rule is run")

    modules = modeling_qwen3_5, modeling_qwen3_5_moe
    for module in modules:
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", chunked)
    folder = reference.write_checkpoint(tmp_path / kind, **reference.KINDS[kind])
    found = reference.run_transformers(folder, [reference.conversation("image", 1)])
    assert all(gradient.any() for gradient in found.gradients.values())
    assert all(module.torch_chunk_gated_delta_rule is chunked for module in modules)
