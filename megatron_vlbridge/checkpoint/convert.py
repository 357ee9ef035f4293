"""Import and export: a Hugging Face folder <-> a Megatron `torch_dist` folder, bit for bit, without a model.

An imported folder keeps, in `hf/`, the source's other files and what its weights were called, so that an export needs
nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.conversion import Conversion
from megatron_vlbridge.checkpoint.dtypes import as_dtype, check_dtypes, hf_tensors, megatron_tensors, narrow_into
from megatron_vlbridge.checkpoint.engine import Options
from megatron_vlbridge.checkpoint.extras import listed, read_notes
from megatron_vlbridge.checkpoint.hub import find_folder
from megatron_vlbridge.checkpoint.portable_config import differences_in_4
from megatron_vlbridge.checkpoint.raw import Filler, gather_into
from megatron_vlbridge.checkpoint.safetensors import (
    DEFAULT_SHARD_BYTES,
    INDEX,
    SafetensorsFolder,
    SafetensorsWriter,
    load_json_object,
    plan_shards,
)
from megatron_vlbridge.checkpoint.side_files import Like, copy_side_files, find_like, keep_side_files, side_files
from megatron_vlbridge.checkpoint.source import open_source
from megatron_vlbridge.checkpoint.torch_dist import TorchDistFolder
from megatron_vlbridge.checkpoint.torch_dist_writer import ReleaseWriter
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.families import ExpertForm, Family, read_config
from megatron_vlbridge.families.experts import find_names
from megatron_vlbridge.families.mtp import HF_LAYERS as MTP_LAYERS
from megatron_vlbridge.weights import Plan, Region, TensorSpec


def import_checkpoint(
    hf_folder: str | Path,
    megatron_folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    leave_out: Sequence[str] = (),
    options: Options | None = None,
    resume: bool = False,
) -> Path:
    """Write a Hugging Face checkpoint as a Megatron checkpoint, and return the new folder.

    `hf_folder` may be a Hub id. The new folder loads through Megatron's `--load` and `--pretrained-checkpoint` at any
    parallel layout. `dtype` (`"float32"`, `"bfloat16"`, `"float16"`) converts all weights; by default each keeps its
    own, and those stored in FP8 become bfloat16. `experts` says the form of fused experts where their shapes do not.
    `leave_out` are patterns (`rotary.*`) for tensors that are no part of the model. `options` says with how many
    threads and how much memory; `resume` continues a run that was interrupted, with the same result.

    Raises VLBridgeError, and leaves nothing under the new name, when the two do not fit each other exactly, a file is
    missing or damaged, the target exists or is being written, or the disk is full.

    Example: `import_checkpoint("Qwen/Qwen3-VL-2B-Instruct", "qwen3-vl-2b-megatron")`.
    """
    plan = plan_import(hf_folder, megatron_folder, dtype=dtype, experts=experts, leave_out=leave_out)
    return plan.run(options, resume=resume)


def export_checkpoint(
    megatron_folder: str | Path,
    hf_folder: str | Path,
    *,
    like: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    max_shard_size: int | None = None,
    portable_config: bool = False,
    options: Options | None = None,
    resume: bool = False,
) -> Path:
    """Write the weights of a Megatron checkpoint as a Hugging Face checkpoint, and return the new folder.

    Config, tokenizer, processor and all other files come unchanged from what the import kept beside the weights, or
    from `like`, the Hugging Face folder (or Hub id) that training started from; a folder that a training run wrote
    holds none. Shards are those of that source, or at most `max_shard_size` bytes each (5 GB where the source does not
    tell); experts have the form that they have there, or `experts`. Names are those of the Hub. Tensors of `like` that
    are no part of the model are copied unchanged. `dtype` converts all weights; by default they keep what the Megatron
    checkpoint holds. Where that is another than the source's, config.json names the new one. With `portable_config` it
    is written so that transformers 4.57 and 5.x read the same model from it. `options` and `resume` are
    those of `import_checkpoint`.

    Raises VLBridgeError, and leaves nothing under the new name, when the two do not fit each other exactly, a file is
    missing or damaged, the target exists or is being written, the disk is full, or it is not known which config
    belongs to the weights.

    Example: `export_checkpoint("run", "trained", like="Qwen/Qwen3-VL-2B-Instruct")`.
    """
    plan = plan_export(
        megatron_folder,
        hf_folder,
        like=like,
        dtype=dtype,
        experts=experts,
        max_shard_size=max_shard_size,
        portable_config=portable_config,
    )
    return plan.run(options, resume=resume)


def plan_import(
    hf_folder: str | Path,
    megatron_folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    leave_out: Sequence[str] = (),
) -> Conversion:
    """What `import_checkpoint` would do, proved from headers alone; arguments and errors are the same."""
    source = open_source(find_folder(hf_folder), experts=experts, leave_out=leave_out)
    weights, table, hf = source.weights, source.table, source.tensors
    wanted = as_dtype(dtype)
    megatron, widened = megatron_tensors(table, hf, wanted)
    plan = Plan(
        table,
        hf,
        megatron,
        cast=wanted is not None,
        widened=widened,
        hf_source=str(weights.folder),
        megatron_source="the new checkpoint",
    )

    def fill(region: Region, out: torch.Tensor) -> None:
        gather_into(out, table.hf_sources(region), weights.read_into, hf)

    return Conversion(
        kind="import",
        architecture=source.family.architecture,
        source=weights.folder,
        target=Path(megatron_folder),
        plan=plan,
        writer=ReleaseWriter(megatron, fill),
        source_files=weights.paths,
        side_files=tuple(side_files(weights.folder)),
        complete=lambda folder: keep_side_files(weights, folder, experts, source.left, wanted),
        check=lambda folder: _check_written(folder, TorchDistFolder(folder).table, megatron),
        notes=tuple(_import_notes(weights, source.left)),
        options={"--dtype": _name(wanted), "--experts": experts, "--leave-out": list(leave_out)},
    )


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _import_notes(weights: SafetensorsFolder, left: Sequence[str]) -> Iterator[str]:
    yield from read_notes(weights)
    if left:
        yield f"left out, as no part of the model: {listed(left)}"


def plan_export(
    megatron_folder: str | Path,
    hf_folder: str | Path,
    *,
    like: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    max_shard_size: int | None = None,
    portable_config: bool = False,
) -> Conversion:
    """What `export_checkpoint` would do, proved from headers alone; arguments and errors are the same."""
    source = Path(megatron_folder)
    weights = TorchDistFolder(source)
    model = find_like(source, like)
    plan = plan_export_of(
        weights,
        hf_folder,
        model,
        dtype=dtype,
        experts=experts,
        max_shard_size=max_shard_size,
        portable_config=portable_config,
    )
    named = None if like is None else str(model.folder.resolve())
    return replace(plan, options={**plan.options, "--like": named})


class MegatronWeights(Protocol):
    """A Megatron checkpoint, wherever its numbers are; `folder` names it in errors."""

    @property
    def folder(self) -> Path:
        """Where it is, or what it is."""
        ...

    @property
    def table(self) -> Mapping[str, TensorSpec]:
        """All tensors."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from."""
        ...

    def read_into(self, region: Region, out: torch.Tensor) -> None:
        """Put the numbers of a region into a tensor of its shape, converted to the tensor's dtype."""
        ...


def plan_export_of(
    weights: MegatronWeights,
    hf_folder: str | Path,
    model: Like,
    *,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    max_shard_size: int | None = None,
    portable_config: bool = False,
) -> Conversion:
    """The export of `weights` with the other files of `model`; arguments and errors are those of `plan_export`."""
    target = Path(hf_folder)
    config = read_config(model.folder)
    family = families.find(config)
    form = family.find_expert_form(config, model.table, experts or model.experts)
    table = family.table_for(config, model.table, experts or model.experts)
    check_dtypes(weights.folder, weights.table)
    wanted = as_dtype(dtype)
    hf, widened = hf_tensors(table, weights.table, model.table, wanted)
    plan = Plan(
        table,
        hf,
        weights.table,
        cast=wanted is not None,
        widened=widened,
        hf_source=f"{target} (made like {model.folder})",
        megatron_source=str(weights.folder),
    )
    if config.tie_word_embeddings and family.head in model.tensors:
        hf[family.head] = hf[family.embedding]
    carried = _carried(model, {*hf, *_own_names(model, config, family)}, family)
    hf |= carried
    read = model.weights.read_into if model.weights is not None else None
    fill = _hf_filler(plan, family.embedding, weights, dict.fromkeys(carried, read))
    files, index = _shards(hf, model, max_shard_size)

    def complete(folder: Path) -> None:
        portable = config if portable_config else None
        copy_side_files(model.folder, folder, wanted or model.dtype_to_name(plan.hf), portable=portable)
        if index is not None:
            shutil.copyfile(index, folder / INDEX)

    return Conversion(
        kind="export",
        architecture=family.architecture,
        source=weights.folder,
        target=target,
        plan=plan,
        writer=SafetensorsWriter(hf, files, fill),
        source_files=(*weights.files, *dict.fromkeys(model.folder / model.tensors[name][0] for name in carried)),
        side_files=tuple(side_files(model.folder)),
        complete=complete,
        check=lambda folder: _check_written(folder, SafetensorsFolder(folder).table, hf),
        notes=(
            *_form_notes(form, family),
            *_export_notes(model.folder, config, list(carried)),
            *_config_notes(model.folder, config, portable_config),
        ),
        options={
            "--dtype": _name(wanted),
            "--experts": experts,
            "--max-shard-size": max_shard_size,
            "--portable-config": portable_config,
        },
    )


def _hf_filler(plan: Plan, embedding: str, weights: MegatronWeights, others: Mapping[str, Filler | None]) -> Filler:
    """Fills regions of Hugging Face tensors: those of the rules, a tied head, `others` with readers of their own."""
    table = plan.table

    def numbers(region: Region, out: torch.Tensor) -> None:
        pieces = table.megatron_sources(region)
        if out.dtype != torch.float32 and any(piece.source.name in plan.widened for piece in pieces):
            narrow_into(region, out, numbers)
        else:
            gather_into(out, pieces, weights.read_into, weights.table)

    def fill(region: Region, out: torch.Tensor) -> None:
        other = others.get(region.name)
        if other is not None:
            other(region, out)
        elif region.name in table.hf_shapes:
            numbers(region, out)
        else:
            numbers(Region(embedding, region.offset, region.shape), out)

    return fill


def _form_notes(form: ExpertForm, family: Family) -> Iterator[str]:
    hub = family.expert_form
    if form is not hub:
        yield f"experts are written as {form}; the Hub's form of them is {hub}: --experts {hub}"


def _export_notes(like: Path, config: Config, carried: Sequence[str]) -> Iterator[str]:
    if config.fp8:
        yield f"weights are not quantised again: quantization_config of {like} is left out of config.json"
    if carried:
        yield f"copied unchanged from {like}, as no part of the model: {listed(carried)}"


def _config_notes(like: Path, config: Config, portable: bool) -> Iterator[str]:
    found = list(differences_in_4(load_json_object(like / "config.json"), config))
    if found and portable:
        yield f"config.json is written for transformers 4.57 too, which would have read {'; '.join(found)}"
    elif found:
        yield (
            f"transformers 4.57 does not read config.json as 5.x does ({'; '.join(found)}): --portable-config (in "
            "Python: portable_config=True) writes one that both read alike"
        )


def _own_names(model: Like, config: Config, family: Family) -> Iterable[str]:
    """What the model's tensors are called in the source, whose experts may have another form than the export's."""
    forms = (
        find_names(config, model.tensors, family.layers),
        find_names(config, model.tensors, MTP_LAYERS, [0]),
    )
    return family.table(config, *forms).hf_shapes


def _carried(model: Like, known: Collection[str], family: Family) -> dict[str, TensorSpec]:
    """The source's tensors that are no part of the model, whose tensors' names are `known`.

    Refuses a source that knows of such tensors but does not hold them.
    """
    names = [name for name in model.tensors if name not in known]
    if names and model.weights is None:
        raise VLBridgeError(
            f"{model.folder}: expected only tensors of a {family.architecture}, found more: {listed(names)}. "
            "Give --like (in Python: like=), the Hugging Face folder that holds them."
        )
    return {name: model.tensors[name][1] for name in names}


def _check_written(folder: Path, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise VLBridgeError(
                f"{folder}: {name}: expected to read back {expected.get(name)}, found {found.get(name)}. "
                "Read-back mismatch: the storage returned different data. Use another disk."
            )


def _shards(
    hf: Mapping[str, TensorSpec], model: Like, max_shard_size: int | None
) -> tuple[dict[str, str], Path | None]:
    """Tensor -> file, and the source's own index where it still says the truth about sizes and files."""
    if max_shard_size is not None and max_shard_size <= 0:
        raise UsageError(f"max_shard_size: expected a positive number of bytes, found {max_shard_size}.")
    if max_shard_size is not None or model.tensors.keys() != hf.keys():
        return plan_shards(hf, max_shard_size or DEFAULT_SHARD_BYTES), None
    files = {name: file for name, (file, _) in model.tensors.items()}
    same_sizes = all(hf[name].dtype == spec.dtype for name, (_, spec) in model.tensors.items())
    return files, model.index if same_sizes else None
