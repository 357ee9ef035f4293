"""Folders of LoRA adapters, written as peft loads them."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_vlbridge.checkpoint.hf.header import encode_header
from megatron_vlbridge.checkpoint.peft.adapter import WEIGHTS
from megatron_vlbridge.checkpoint.peft.config import CONFIG, AdapterConfig
from megatron_vlbridge.checkpoint.stream.raw import as_bytes
from megatron_vlbridge.checkpoint.stream.staging import staged_folder
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import TensorSpec

_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def write_adapter(folder: Path, base_model: str, config: AdapterConfig, pairs: Pairs) -> None:
    """Write a PEFT folder, whole or not at all; `base_model` is the base's folder or Hub id.

    `pairs` has by the name of its weight A `[r, in]` and B `[out, r]`, of experts A `[E, r, in]` and B `[E, out, r]`,
    on the CPU and of any floating dtype, which is kept.

    Raises VLBridgeError, naming the weight, expected and found, for a pair of another rank than the config's, and where
    the folder is taken or cannot be written.
    Example: `write_adapter(Path("adapter"), "Qwen/Qwen3-VL-2B-Instruct", AdapterConfig(8, 16.0), pairs)`.
    """
    if not pairs:
        raise VLBridgeError(f"{folder}: expected the weights of an adapter, found none.")
    tensors: dict[str, torch.Tensor] = {}
    for weight, (a, b) in pairs.items():
        _check(folder, config, weight, a, b)
        tensors |= peft_tensors(weight, a, b, pairs)
    # Wider dtypes first keeps every tensor aligned to its own size.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    head = encode_header({key: TensorSpec(tuple(value.shape), value.dtype) for key, value in tensors.items()})
    with staged_folder(folder, {}) as staging:
        text = json.dumps(_config(base_model, config, pairs), indent=2) + "\n"
        (staging.folder / CONFIG).write_text(text, encoding="utf-8")
        with (staging.folder / WEIGHTS).open("wb") as stream:
            stream.write(head)
            for value in tensors.values():
                stream.write(as_bytes(value))


def peft_tensors(weight: str, a: torch.Tensor, b: torch.Tensor, weights: Collection[str]) -> dict[str, torch.Tensor]:
    """A and B of a weight, one of the `weights` of an adapter, under the names and in the shapes that `peft` has.

    A of experts `[E, r, in]` becomes `[E * r, in]`, and B `[E, out, r]` becomes `[out, r * E]` with the expert fastest.
    Example: `peft_tensors("lm_head.weight", a, b, weights)` has `base_model.model.lm_head.lora_A.weight`.
    """
    if a.ndim == 3:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    prefix = f"base_model.model.{_module(weight, weights)}.lora_"
    return {f"{prefix}A.weight": a.contiguous(), f"{prefix}B.weight": b.contiguous()}


def _module(weight: str, weights: Collection[str]) -> str:
    """The inverse of `_weight_name` in `adapter.py`."""
    if weight.endswith(_GATE_UP):
        experts = weight.removesuffix(".gate_up_proj")
        return f"{experts}.base_layer" if weight.replace(_GATE_UP, _DOWN) in weights else experts
    return weight.removesuffix(".down_proj" if weight.endswith(_DOWN) else ".weight")


def _check(folder: Path, config: AdapterConfig, weight: str, a: torch.Tensor, b: torch.Tensor) -> None:
    experts = weight.endswith((_GATE_UP, _DOWN))
    if not (experts or weight.endswith(".weight")):
        raise VLBridgeError(f"{folder}: {weight}: expected a .weight, or gate_up_proj or down_proj of experts.")
    rank, dims = config.rank_of(weight.removesuffix(".weight")), 3 if experts else 2
    fits = a.ndim == b.ndim == dims and a.shape[:-2] == b.shape[:-2] and a.shape[-2] == b.shape[-1] == rank
    if not (fits and a.is_floating_point() and b.is_floating_point()):
        form = "A [E, r, in] and B [E, out, r]" if experts else "A [r, in] and B [out, r]"
        raise VLBridgeError(
            f"{folder}: {weight}: expected {form} of rank {rank} and floating dtype, found {list(a.shape)} {a.dtype} "
            f"and {list(b.shape)} {b.dtype}. Give the config of these pairs."
        )


def _config(base_model: str, config: AdapterConfig, pairs: Pairs) -> dict[str, Any]:
    modules = [weight.removesuffix(".weight") for weight in pairs if weight.endswith(".weight")]
    parameters = [weight for weight in pairs if not weight.endswith(".weight")]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "rank_pattern": dict(config.ranks),
        "alpha_pattern": dict(config.alphas),
        "target_modules": modules or None,
        "target_parameters": parameters or None,
        "bias": "none",
        "inference_mode": True,
    }
