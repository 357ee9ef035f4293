"""What of a Hugging Face folder a model is made of, after a look at everything that headers do not tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.dtypes import check_dtypes
from megatron_vlbridge.checkpoint.extras import left_out
from megatron_vlbridge.checkpoint.formats import reject_megatron
from megatron_vlbridge.checkpoint.safetensors import SafetensorsFolder, row_blocks
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import Family, read_config
from megatron_vlbridge.weights import Region, RuleTable, TensorSpec


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder and the rules for it; a `Plan` is still to prove that the two fit.

    `tensors` are those to be moved: without the ones that are `left` out, and without a stored head that is tied.
    """

    weights: SafetensorsFolder
    config: Config
    family: Family
    table: RuleTable
    tensors: dict[str, TensorSpec]
    left: list[str]


def open_source(folder: Path, *, experts: str | None = None, leave_out: Sequence[str] = ()) -> Source:
    """Read headers and scales of a folder; `experts` and `leave_out` are those of `import_checkpoint`.

    Raises VLBridgeError, naming file and tensor, for damaged files, numbers that are no weights, scales that are none,
    a tied head that is another, and patterns that fit nothing or the model's own tensors.
    """
    reject_megatron(folder)
    config = read_config(folder)
    family = families.find(config)
    weights = SafetensorsFolder(folder)
    check_scales(config, weights)
    table = family.table_for(config, weights.table, experts)
    left = left_out(folder, weights.table, {*table.hf_shapes, family.head}, leave_out)
    hf = {name: spec for name, spec in weights.table.items() if name not in left}
    check_dtypes(folder, {name: spec for name, spec in hf.items() if name in table.hf_shapes})
    if config.tie_word_embeddings and family.head in hf:
        check_tied_head(weights, family)
        del hf[family.head]
    return Source(weights, config, family, table, hf, left)


def check_scales(config: Config, weights: SafetensorsFolder) -> None:
    """Refuse scales of 8-bit weights that are no scales, and a config that says otherwise than the tensors."""
    weights.check_scales()
    if config.fp8 != bool(weights.scaled):
        found = f"{weights.scaled[0]} in FP8" if weights.scaled else "no such tensor"
        expected = "FP8 tensors" if config.fp8 else "none in FP8"
        raise VLBridgeError(
            f"{weights.folder}: expected {expected}, as quantization_config in config.json says, found {found}. "
            "Use the config.json that belongs to these weights."
        )


def check_tied_head(weights: SafetensorsFolder, family: Family) -> None:
    """Refuse a stored output head that is not the embedding, bit for bit, although the config says they are one."""
    head, embedding = weights.table[family.head], weights.table.get(family.embedding)
    same = head == embedding and all(
        torch.equal(
            weights.read(block).view(torch.uint8),
            weights.read(Region(family.embedding, block.offset, block.shape)).view(torch.uint8),
        )
        for block in row_blocks(Region.whole(family.head, head.shape), head.dtype.itemsize)
    )
    if not same:
        raise VLBridgeError(
            f"{weights.folder}: {family.head}: expected the numbers of {family.embedding}, as tie_word_embeddings is "
            f"true, found others ({head}; {embedding}). Set tie_word_embeddings to false if the head is its own."
        )
