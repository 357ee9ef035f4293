"""The tensors of a Hugging Face folder that make the model, after all checks that headers alone do not allow."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.dtypes import check_dtypes
from megatron_vlbridge.checkpoint.formats import reject_megatron
from megatron_vlbridge.checkpoint.hf.reader import SafetensorsFolder
from megatron_vlbridge.checkpoint.stream.parts import row_blocks
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import Family, read_config
from megatron_vlbridge.families.mtp import check_mtp_tensors, without_mtp
from megatron_vlbridge.weights import Region, RuleTable, TensorSpec


@dataclass(frozen=True)
class HfSource:
    """A Hugging Face folder and the rules for it; a `Plan` is still to prove that the two fit.

    `tensors` are those to be moved: without the `ignored` ones, and without a stored head that is tied.
    """

    weights: SafetensorsFolder
    config: Config
    family: Family
    table: RuleTable
    tensors: dict[str, TensorSpec]
    ignored: list[str]


def open_source(
    folder: Path, *, experts: str | None = None, ignore: Sequence[str] = (), random_mtp: bool = False
) -> HfSource:
    """Read headers and scales of a folder; `experts` and `ignore` are those of `import_checkpoint`.

    With `random_mtp` there are no rules for the MTP layer, which the folder must not have.

    Raises VLBridgeError, naming file and tensor, for damaged files, tensors that are not weights, invalid scales, a
    tied head with other values, and patterns that match nothing or the model's own tensors.
    """
    reject_megatron(folder)
    config = read_config(folder)
    family = families.find(config)
    weights = SafetensorsFolder(folder)
    check_scales(config, weights)
    check_mtp_tensors(config, weights.table, str(folder), random_mtp)
    table = family.table_for(without_mtp(config) if random_mtp else config, weights.table, experts)
    ignored = _ignored_tensors(folder, weights.table, {*table.hf_shapes, family.head}, ignore)
    ignored += [name for name in family.find_other_tensors(weights.table) if name not in ignored]
    hf = {name: spec for name, spec in weights.table.items() if name not in ignored}
    check_dtypes(folder, {name: spec for name, spec in hf.items() if name in table.hf_shapes})
    if config.tie_word_embeddings and family.head in hf:
        check_tied_head(weights, family)
        del hf[family.head]
    return HfSource(weights, config, family, table, hf, ignored)


def _ignored_tensors(
    folder: Path, names: Collection[str], needed: Collection[str], patterns: Sequence[str]
) -> list[str]:
    """Those of a folder's tensors that match the user's `patterns` (`rotary.*`, as in a shell).

    Raises VLBridgeError where a pattern matches no tensor, or one of those `needed` by the model.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        wanted = [name for name in matching if name in needed]
        if not matching or wanted:
            text = f"tensors of the model, such as {wanted[0]}" if wanted else "no tensor that it matches"
            raise VLBridgeError(
                f"{folder}: ignore: expected {pattern!r} to match tensors that are not part of the model, found "
                f"{text}. Name those that the error without this option lists."
            )
        found |= dict.fromkeys(matching)
    return list(found)


def check_scales(config: Config, weights: SafetensorsFolder) -> None:
    """Reject invalid scales of 8-bit weights, and a config that disagrees with the tensors about FP8."""
    weights.check_scales()
    if config.fp8 != bool(weights.scaled):
        found = f"{weights.scaled[0]} in FP8" if weights.scaled else "no such tensor"
        expected = "FP8 tensors" if config.fp8 else "none in FP8"
        raise VLBridgeError(
            f"{weights.folder}: expected {expected}, as quantization_config in config.json says, found {found}. "
            "Use the config.json that belongs to these weights."
        )


def check_tied_head(weights: SafetensorsFolder, family: Family) -> None:
    """Reject a stored output head that is not the embedding, bit for bit, although the config says they are tied."""
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
            f"{weights.folder}: {family.head}: expected the values of {family.embedding}, as tie_word_embeddings is "
            f"true, found others ({head}; {embedding}). Set tie_word_embeddings to false if the head is its own."
        )
