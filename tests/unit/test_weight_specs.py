"""The specs of an export from a config alone: what a folder of the export holds, for published models too."""

from pathlib import Path

import pytest
import torch

from megatron_vlbridge import hf_weight_specs, read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.weights import TensorSpec
from tests import reference
from tests.unit.test_convert import tensors

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kind", reference.KINDS)
def test_they_are_those_of_an_exported_folder(kind: str, fp8: bool, tmp_path: Path) -> None:
    source = reference.write_checkpoint(tmp_path / "hf", **reference.KINDS[kind])
    imported = import_checkpoint(source, tmp_path / "megatron")
    folder = export_checkpoint(imported, tmp_path / "back", fp8=fp8, experts="hub")
    found = {name: TensorSpec(tuple(x.shape), x.dtype) for name, x in tensors(folder).items()}
    assert hf_weight_specs(read_config(source), fp8=fp8) == found


def test_the_dtype_is_that_of_the_config_or_the_one_given() -> None:
    config = read_config(CONFIGS / "Qwen3-VL-8B-Instruct.json")
    assert {spec.dtype for spec in hf_weight_specs(config).values()} == {torch.bfloat16}
    assert {spec.dtype for spec in hf_weight_specs(config, dtype="float32").values()} == {torch.float32}


def test_235b_without_a_process_group() -> None:
    """94 layers of 128 experts: fused by default, single in FP8."""
    config = read_config(CONFIGS / "Qwen3-VL-235B-A22B-Instruct.json")
    layer = "model.language_model.layers.93.mlp.experts"
    specs = hf_weight_specs(config)
    assert not torch.distributed.is_initialized()
    assert len(specs) == 1388
    assert specs[f"{layer}.gate_up_proj"] == TensorSpec((128, 4096, 3072), torch.bfloat16)
    single = hf_weight_specs(config, fp8=True)
    assert len(single) == 37_296 + 94 * (4 + 3 * 128)
    assert single[f"{layer}.127.gate_proj.weight"] == TensorSpec((1536, 4096), torch.float8_e4m3fn)
    assert single[f"{layer}.127.gate_proj.weight_scale_inv"] == TensorSpec((12, 32), torch.float32)


def test_options_that_are_none_are_refused() -> None:
    config = read_config(CONFIGS / "Qwen3-VL-2B-Instruct.json")
    with pytest.raises(UsageError, match="dtype: expected one of"):
        hf_weight_specs(config, dtype="float8")
    with pytest.raises(UsageError, match="experts: expected one of hub"):
        hf_weight_specs(config, experts="vllm")
    with pytest.raises(VLBridgeError, match="expected float32 or bfloat16 for an export in FP8"):
        hf_weight_specs(config, dtype="float16", fp8=True)
