"""Checkpoints quantised to FP8 in blocks of 128 x 128, and what their numbers stand for, block by block with torch."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["visual", "lm_head"],
}


def blocks(shape: torch.Size | tuple[int, ...]):
    """Every block of a matrix or of a stack of them, as an index, with the index of its scale."""
    rows, columns = shape[-2:]
    for row in range(-(-rows // 128)):
        for column in range(-(-columns // 128)):
            place = (slice(128 * row, 128 * (row + 1)), slice(128 * column, 128 * (column + 1)))
            for lead in range(shape[0]) if len(shape) == 3 else [...]:
                yield (lead, *place), (lead, row, column)


def quantise(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """`(numbers, scales)`."""
    scales = torch.empty(*tensor.shape[:-2], *(-(-size // 128) for size in tensor.shape[-2:]), dtype=dtype)
    numbers = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
    for place, block in blocks(tensor.shape):
        scales[block] = tensor[place].abs().max() / 448
        numbers[place] = (tensor[place].float() / scales[block].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return numbers, scales


def quantise_in_fp32(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(numbers, scales)` as an export has them: all in float32, with a normal scale also where a block is zero."""
    scales = torch.empty([-(-size // 128) for size in tensor.shape])
    numbers = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
    for place, block in blocks(tensor.shape):
        values = tensor[place].float()
        scales[block] = max((values.abs().max() / torch.tensor(448.0)).item(), 2.0**-126)
        numbers[place] = (values / scales[block]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return numbers, scales


def dequantise(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What they stand for, in bfloat16."""
    result = torch.empty(numbers.shape, dtype=torch.bfloat16)
    for place, block in blocks(numbers.shape):
        result[place] = (numbers[place].float() * scales[block].float()).to(torch.bfloat16)
    return result


def is_quantised(name: str) -> bool:
    """As published: the linears of the language model."""
    linears = ("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight", "gate_up_proj", "down_proj")
    return ".layers." in name and name.endswith(linears)


def quantise_folder(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Quantise a folder in place; gives what its tensors stand for."""
    result = {}
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        for name in list(found):
            result[name] = found[name]
            if is_quantised(name):
                found[name], found[f"{name}_scale_inv"] = quantise(found[name], dtype)
                result[name] = dequantise(found[name], found[f"{name}_scale_inv"])
        save_file(found, path)
        files |= dict.fromkeys(found, path.name)
    if (folder / INDEX).exists():
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return result
