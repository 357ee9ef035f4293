"""FP8 exports loaded by transformers, which needs accelerate for it: dequantised to the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from tests import reference
from tests.unit.test_convert import tensors

# Multiples of 128: transformers has no blocks that are smaller. No square experts.
TEXT: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 64}
LINEAR = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 128}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}
SIZES: dict[str, dict[str, Any]] = {
    "dense": {"rope_parameters": ROPE | {"mrope_section": [12, 10, 10]}},
    "linear": LINEAR | {"rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "partial_rotary_factor": 0.5}},
}
SIZES["linear-experts"] = SIZES["linear"]


@pytest.mark.parametrize("kind", SIZES)
def test_transformers_loads_an_export_in_fp8(kind: str, tmp_path: Path) -> None:
    text, vision = TEXT | SIZES[kind], {"out_hidden_size": TEXT["hidden_size"]}
    source = reference.write_checkpoint(
        tmp_path / "hf", text_fields=text, vision_fields=vision, **reference.KINDS[kind]
    )
    imported = import_checkpoint(source, tmp_path / "megatron", dtype="bfloat16")
    folder = export_checkpoint(imported, tmp_path / "fp8", fp8=True)
    experts = "fused_out_in" if "experts" in kind else None
    expected = tensors(
        export_checkpoint(import_checkpoint(folder, tmp_path / "back"), tmp_path / "plain", experts=experts)
    )
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.int16), x.view(torch.int16)) for name, x in expected.items())
    unquantised = tensors(export_checkpoint(imported, tmp_path / "unquantised", experts=experts))
    assert sum(not torch.equal(unquantised[name], x) for name, x in expected.items()) > 20
