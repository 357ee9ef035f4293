"""The plan of an export, verified from headers alone."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.conversion import Conversion, check_read_back, dtype_name
from megatron_vlbridge.checkpoint.dtypes import as_dtype, check_dtypes, downcast_into, hf_tensors
from megatron_vlbridge.checkpoint.hf.portable_config import differences_in_4
from megatron_vlbridge.checkpoint.hf.quantise import quantised_output, quantization_config, specs_as_read
from megatron_vlbridge.checkpoint.hf.reader import INDEX, SafetensorsFolder, listed
from megatron_vlbridge.checkpoint.hf.side_files import copy_side_files, side_files
from megatron_vlbridge.checkpoint.hf.template import ExportTemplate, find_template
from megatron_vlbridge.checkpoint.hf.writer import DEFAULT_SHARD_BYTES, Reads, SafetensorsWriter, plan_shards
from megatron_vlbridge.checkpoint.peft.manifest import read_adapter_manifest
from megatron_vlbridge.checkpoint.stream.json_file import load_json_object
from megatron_vlbridge.checkpoint.stream.raw import Filler, gather_into
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.families import Family, read_config
from megatron_vlbridge.families.experts import detect_form_by_names, fp8_form, moe_layers
from megatron_vlbridge.families.mtp import HF_LAYERS as MTP_LAYERS
from megatron_vlbridge.weights import Plan, Region, TensorSpec

if TYPE_CHECKING:
    from megatron_vlbridge.checkpoint.live.weights import LiveWeights


@dataclass(frozen=True)
class ExportChoices:
    """What a user chooses of an export; `export_checkpoint` describes each."""

    dtype: str | torch.dtype | None = None
    experts: str | None = None
    max_shard_size: int | None = None
    portable_config: bool = False
    fp8: bool = False

    def form_to_ask(self, config: Config, template: ExportTemplate) -> str | None:
        """The form of the experts to ask the family for."""
        return fp8_form(config, self.experts) if self.fp8 else self.experts or template.experts


DEFAULTS = ExportChoices()


@dataclass(frozen=True, kw_only=True)
class Export(Conversion):
    """Megatron -> Hugging Face.

    `tensors` are those to be written, with `index` as their index where it is that of the template. `config_dtype` is
    what config.json is to name (None: what it names), `portable` what it means, where it is to be rewritten, and
    `quantization` what it is to say of that.
    """

    kind = "export"
    writer: SafetensorsWriter
    template: ExportTemplate
    tensors: Mapping[str, TensorSpec]
    index: Path | None
    config_dtype: torch.dtype | None
    portable: Config | None
    quantization: Mapping[str, object] | None

    def complete(self, folder: Path) -> None:
        """Copy the template's other files."""
        copy_side_files(
            self.template.folder, folder, self.config_dtype, portable=self.portable, quantization=self.quantization
        )
        if self.index is not None:
            shutil.copyfile(self.index, folder / INDEX)

    def check(self, folder: Path) -> None:
        """Read the headers back."""
        check_read_back(folder, SafetensorsFolder(folder).table, specs_as_read(self.tensors))


type MegatronWeights = TorchDistFolder | LiveWeights
"""A Megatron checkpoint, on disk or in a live model; `folder` names it in errors."""


def plan_export(
    megatron_folder: str | Path,
    hf_folder: str | Path,
    like: str | Path | None = None,
    choices: ExportChoices = DEFAULTS,
) -> Export:
    """What `export_checkpoint` would do, verified from headers alone; errors are the same."""
    source = Path(megatron_folder)
    weights = TorchDistFolder(source)
    if read_adapter_manifest(weights.folder) is not None:
        raise VLBridgeError(
            f"{weights.folder}: expected the weights of a model, found adapters (a run with --lora-rank). Export them "
            "with --adapter, or `export_adapter`."
        )
    template = find_template(source, like)
    plan = plan_export_of(weights, hf_folder, template, choices)
    named = None if like is None else str(template.folder.resolve())
    return replace(plan, options={**plan.options, "--like": named})


def plan_export_of(
    weights: MegatronWeights, hf_folder: str | Path, template: ExportTemplate, choices: ExportChoices = DEFAULTS
) -> Export:
    """The export of `weights` with the other files of `template`; errors are those of `export_checkpoint`."""
    target, dtype = Path(hf_folder), as_dtype(choices.dtype)
    config = read_config(template.folder)
    family, experts = families.find(config), choices.form_to_ask(config, template)
    table = family.table_for(config, template.table, experts)
    check_dtypes(weights.folder, weights.table)
    hf, upcast = hf_tensors(table, weights.table, template.table, dtype)
    plan = Plan(
        table,
        hf,
        weights.table,
        cast=dtype is not None,
        upcast=upcast,
        hf_source=f"{target} (made like {template.folder})",
        megatron_source=str(weights.folder),
    )
    tensors, passthrough = _tensors_to_write(plan, template, config, family)
    fill, reads = _hf_filler(plan, family.embedding, weights, template, passthrough), Reads()
    if choices.fp8:
        tensors, fill, reads = quantised_output(tensors, fill, passthrough)
    files, index = plan_files(tensors, template, choices.max_shard_size)
    return Export(
        architecture=family.architecture,
        source=weights.folder,
        target=target,
        plan=plan,
        writer=SafetensorsWriter(tensors, files, fill, reads),
        source_files=(
            *weights.files,
            *dict.fromkeys(template.folder / template.tensors[name][0] for name in passthrough),
        ),
        side_files=tuple(side_files(template.folder)),
        notes=tuple(_notes(template, config, family, passthrough, choices)),
        options={
            "--dtype": dtype_name(dtype),
            "--experts": choices.experts,
            "--max-shard-size": choices.max_shard_size,
            "--portable-config": choices.portable_config,
            **({"--fp8": True} if choices.fp8 else {}),  # earlier versions did not note it
        },
        template=template,
        tensors=tensors,
        index=index,
        config_dtype=dtype or template.dtype_to_name(plan.hf),
        portable=config if choices.portable_config else None,
        quantization=quantization_config(tensors, family.head) if choices.fp8 else None,
    )


def _tensors_to_write(
    plan: Plan, template: ExportTemplate, config: Config, family: Family
) -> tuple[dict[str, TensorSpec], list[str]]:
    """The model's tensors, a tied head where the template stores one, and what is not part of the model: its names.

    Raises VLBridgeError where the template lists tensors that are not part of the model, but does not hold them.
    """
    hf = dict(plan.hf)
    if config.tie_word_embeddings and family.head in template.tensors:
        hf[family.head] = hf[family.embedding]
    # The template's experts may have another form than the export's.
    forms = (
        detect_form_by_names(config, template.tensors, family.layers),
        detect_form_by_names(config, template.tensors, MTP_LAYERS, [0]),
    )
    own = family.table(config, *forms).hf_shapes
    known = {*hf, *own, *family.find_other_tensors(template.tensors)}
    passthrough = [name for name in template.tensors if name not in known]
    if passthrough and template.weights is None:
        raise VLBridgeError(
            f"{template.folder}: expected only tensors of a {family.architecture}, found more: {listed(passthrough)}. "
            "Give --like (in Python: like=), the Hugging Face folder that holds them."
        )
    return hf | {name: template.tensors[name][1] for name in passthrough}, passthrough


def _hf_filler(
    plan: Plan, embedding: str, weights: MegatronWeights, template: ExportTemplate, passthrough: Sequence[str]
) -> Filler:
    """Fills regions of Hugging Face tensors: those of the rules, a tied head, and those of the template."""
    table = plan.table

    def values(region: Region, out: torch.Tensor) -> None:
        pieces = table.megatron_sources(region)
        if out.dtype != torch.float32 and any(piece.source.name in plan.upcast for piece in pieces):
            downcast_into(region, out, values)
        else:
            gather_into(out, pieces, weights.read_into, weights.table)

    def fill(region: Region, out: torch.Tensor) -> None:
        if region.name in passthrough and template.weights is not None:
            template.weights.read_into(region, out)
        elif region.name in table.hf_shapes:
            values(region, out)
        else:
            values(Region(embedding, region.offset, region.shape), out)

    return fill


def _notes(
    template: ExportTemplate, config: Config, family: Family, passthrough: Sequence[str], choices: ExportChoices
) -> Iterator[str]:
    like, hub = template.folder, family.expert_form
    form = family.find_expert_form(config, template.table, choices.form_to_ask(config, template))
    if choices.fp8:
        yield "linear layers are written in FP8, with a float32 scale for each block of 128 x 128"
        if form is not hub and moe_layers(config):
            yield "experts are written one by one, as vLLM and sglang load them; transformers may not"
    elif form is not hub:
        yield f"experts are written as {form}; the Hub's form of them is {hub}: --experts {hub}"
    if config.fp8 and not choices.fp8:
        yield f"weights are not quantised again: quantization_config of {like} is removed from config.json (see --fp8)"
    if passthrough:
        yield f"copied unchanged from {like}, as not part of the model: {listed(passthrough)}"
    if left_out := family.find_other_tensors(template.tensors):
        yield f"left out, as not part of the model: {listed(left_out)}"
    raw = load_json_object(like / "config.json")
    found = list(differences_in_4(raw, config)) if family.config.in_transformers_4 else []
    if found and choices.portable_config:
        yield f"config.json is written for transformers 4.57 too, which would have read {'; '.join(found)}"
    elif found:
        yield (
            f"transformers 4.57 does not read config.json as 5.x does ({'; '.join(found)}): --portable-config (in "
            "Python: portable_config=True) writes one that both read alike"
        )


def plan_files(
    hf: Mapping[str, TensorSpec], template: ExportTemplate, max_shard_size: int | None = None
) -> tuple[dict[str, str], Path | None]:
    """Tensor -> file, and the template's own index where it is still right about sizes and files."""
    if max_shard_size is not None and max_shard_size <= 0:
        raise UsageError(f"max_shard_size: expected a positive number of bytes, found {max_shard_size}.")
    in_folders = any("/" in file for file, _ in template.tensors.values())
    if max_shard_size is not None or template.tensors.keys() != hf.keys() or in_folders:
        return plan_shards(hf, max_shard_size or DEFAULT_SHARD_BYTES), None
    files = {name: file for name, (file, _) in template.tensors.items()}
    same_sizes = all(hf[name].dtype == spec.dtype for name, (_, spec) in template.tensors.items())
    return files, template.index if same_sizes else None
