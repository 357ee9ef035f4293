"""The oracle for LoRA: transformers with merged weights, and the chain rule from their gradients to those of a pair."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge import read_config
from megatron_vlbridge.model.lora.targets import lora_table, select_weights

RANK, ALPHA = 3, 6.0
SCALING = ALPHA / RANK

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Of each weight A `[r, in]` and B `[out, r]`, of experts `[E, r, in]` and `[E, out, r]`."""


def random_pairs(folder: Path, targets: Sequence[str] | None = None, vision: bool = False) -> dict[str, tuple]:
    """A pair for each weight of the targets; neither matrix is zero."""
    config, generator = read_config(folder), torch.Generator().manual_seed(11)
    shapes = lora_table(config).hf_shapes
    pairs = {}
    for name in select_weights(config, targets, vision):
        *lead, rows, columns = shapes[name]
        a = torch.randn(*lead, RANK, columns, generator=generator) / columns**0.5
        # With larger ones transformers itself is, with linear attention, 1.5e-5 off its gradients in fp64.
        pairs[name] = a, 0.05 * torch.randn(*lead, rows, RANK, generator=generator)
    return pairs


def write_merged(folder: Path, target: Path, pairs: Pairs) -> Path:
    """The checkpoint with `W + scaling * B A` in place of each W."""
    shutil.copytree(folder, target)
    merged = set()
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name in pairs.keys() & tensors.keys():
            a, b = pairs[name]
            delta = SCALING * b @ a
            # Experts that the file has the other way around.
            tensors[name] += delta if delta.shape == tensors[name].shape else delta.transpose(1, 2)
            merged.add(name)
        save_file(tensors, path, metadata={"format": "pt"})
    assert merged == pairs.keys()
    return target


def adapter_gradients(gradients: Mapping[str, torch.Tensor], pairs: Pairs) -> dict[str, tuple]:
    """The gradients of A and B from that of `W + scaling * B A`."""
    found = {}
    for name, (a, b) in pairs.items():
        gradient = gradients[name].double()
        found[name] = (
            SCALING * b.double().transpose(-1, -2) @ gradient,
            SCALING * gradient @ a.double().transpose(-1, -2),
        )
    return found
