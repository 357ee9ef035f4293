"""A merged checkpoint holds, bit for bit, what peft's `merge_and_unload` makes of the base and the adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_vlbridge import import_checkpoint, merge_adapter
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from megatron_vlbridge.errors import VLBridgeError
from tests import reference

ALL = r".*\.(\w*_proj|in_proj_\w+|qkv|proj|linear_fc[12])"
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "mlp.experts.down_proj": 5},
    "alpha_pattern": {r".*layers\.1\.self_attn\.v_proj": 9, "o_proj": 0},
}
PARAMETER_PATTERNS = {"rank_pattern": {"q_proj.weight": 2}, "alpha_pattern": {"q_proj.weight": 50, "k_proj": 7}}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def write_base(folder: Path, kind: str, dtype: torch.dtype, tied: bool = False) -> Path:
    """A checkpoint in several files; of Qwen3.5-MoE with tensors for each expert."""
    source = reference.write_checkpoint(folder / "fp32", tied=tied, **reference.KINDS[kind])
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size="100KB", save_original_format=True)
    return folder / "base"


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def write_peft(base: Path, folder: Path, *, copies: bool = False, **options: Any) -> Path:
    """A folder that peft saves, of random A and B, with or without copies of embeddings and heads."""
    adapted = get_peft_model(load(base, F32), LoraConfig(**{"r": 3, "lora_alpha": 5, **options}))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder, save_embedding_layers=copies)
    return folder


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name].view(torch.uint8), x.view(torch.uint8)), name


LINEAR = "(?!.*patch_embed)" + ALL
EXPERTS = {"target_parameters": FUSED}
CASES = [
    ("dense", F32, {}),
    ("dense", BF16, {}),
    ("dense", F16, {"use_rslora": True}),
    ("dense", BF16, PATTERNS),
    ("dense", F32, {"target_modules": ["lm_head", "q_proj"]}),
    ("experts", F32, EXPERTS),
    ("experts", BF16, {**EXPERTS, **PATTERNS}),
    ("experts", BF16, {"target_parameters": FUSED[:1], "r": 1}),
    ("experts", BF16, {"target_parameters": [*FUSED[1:], "mlp.gate.weight"], "use_rslora": True}),
    ("experts", F32, {"target_parameters": ["mlp.gate.weight"], "alpha_pattern": {"mlp.gate": 50}}),
    ("experts", F32, {"target_parameters": ["mlp.gate.weight"], "alpha_pattern": {"mlp.gate.weight": 50}}),
    ("dense", F32, {"target_parameters": ["q_proj.weight"], "target_modules": ["k_proj"], **PARAMETER_PATTERNS}),
    ("linear", BF16, {"r": 70}),
    ("linear-experts", F32, EXPERTS),
    ("linear-experts", BF16, EXPERTS),
]


@pytest.mark.filterwarnings("error:.*(unexpected|missing).*:UserWarning")
@pytest.mark.parametrize(("kind", "dtype", "options"), CASES, ids=str)
def test_a_merged_checkpoint_is_that_of_peft(
    tmp_path: Path, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    base = write_base(tmp_path, kind, dtype)
    adapter = write_peft(base, tmp_path / "adapter", **{"target_modules": LINEAR, **options})
    merged = PeftModel.from_pretrained(load(base, dtype), adapter).merge_and_unload()
    found = merge_adapter(base, adapter, tmp_path / "merged")
    assert_bits(state(load(found, dtype)), state(merged))
    changed = {name for name, x in state(load(base, dtype)).items() if not torch.equal(x, merged.state_dict()[name])}
    assert len(changed) > 4

    # The weights in Megatron's form are the same base.
    imported = import_checkpoint(base, tmp_path / "imported")
    again = merge_adapter(imported, adapter, tmp_path / "again")
    for path in sorted(found.glob("*")):
        assert path.name == CHECKSUMS or path.read_bytes() == (again / path.name).read_bytes(), path


@pytest.mark.parametrize("dtype", [BF16, F16, torch.float64], ids=str)
def test_an_adapter_of_another_dtype_is_merged_as_peft_does(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path, "experts", F32)
    adapter = write_peft(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=FUSED)
    path = adapter / "adapter_model.safetensors"
    save_file({name: x.to(dtype) for name, x in load_file(path).items()}, path)
    merged = PeftModel.from_pretrained(load(base, F32), adapter).merge_and_unload()
    assert_bits(state(load(merge_adapter(base, adapter, tmp_path / "merged"), F32)), state(merged))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapters_of_tied_weights_and_of_embeddings_are_rejected(tmp_path: Path, module: str) -> None:
    base = write_base(tmp_path, "dense", F32, tied=True)
    adapter = write_peft(base, tmp_path / "adapter", target_modules=[module, "q_proj"])
    with pytest.raises(VLBridgeError, match="embeddings, convolutions and tied heads are not supported"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True, "target_modules": r".*visual.*\.qkv"}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": r".*patch_embed\.proj"}, "patch_embed"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_modules": ["lm_head"], "copies": True}, "save_embedding_layers=False"),
    ],
    ids=str,
)
def test_other_kinds_of_adapters_are_rejected(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    base = write_base(tmp_path, "dense", F32)
    adapter = write_peft(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **options})
    with pytest.raises(VLBridgeError, match=words):
        merge_adapter(base, adapter, tmp_path / "merged")
