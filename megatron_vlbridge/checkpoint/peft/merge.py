"""The merge of an adapter into its base: a Hugging Face checkpoint, written as an export writes one."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.dtypes import megatron_tensors
from megatron_vlbridge.checkpoint.export_plan import Export, ExportChoices, plan_export, plan_files
from megatron_vlbridge.checkpoint.formats import is_megatron
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.reader import listed
from megatron_vlbridge.checkpoint.hf.side_files import side_files
from megatron_vlbridge.checkpoint.hf.source import open_source
from megatron_vlbridge.checkpoint.hf.template import ExportTemplate
from megatron_vlbridge.checkpoint.hf.writer import SafetensorsWriter
from megatron_vlbridge.checkpoint.peft.adapter import WEIGHTS, base_shapes, read_adapter
from megatron_vlbridge.checkpoint.peft.config import CONFIG
from megatron_vlbridge.checkpoint.peft.delta import Delta
from megatron_vlbridge.checkpoint.stream.engine import Options
from megatron_vlbridge.errors import UsageError
from megatron_vlbridge.families import ExpertForm, find, read_config
from megatron_vlbridge.weights import Plan, Region


@dataclass(frozen=True, kw_only=True)
class Merge(Export):
    """A base and an adapter -> Hugging Face."""

    kind = "merge"


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    like: str | Path | None = None,
    experts: str | None = None,
    options: Options | None = None,
    resume: bool = False,
) -> Path:
    """Write a checkpoint with an adapter merged into its weights, and return the new folder.

    `base` is a Hugging Face folder or Hub id, or a Megatron folder as `export_checkpoint` takes it, with `like`;
    `adapter` is a folder of `peft`. Weights keep their names, shards and dtypes, and all other files are those of the
    base. Every value is that of `peft`'s `merge_and_unload` on the CPU: `Delta` has the arithmetic. Weights stored in
    FP8 become bfloat16. `experts`, `options` and `resume` are those of `import_checkpoint`.

    Raises VLBridgeError, and leaves nothing under the new name: the adapter does not fit the base, or is of a kind that
    is not supported (`read_adapter`), a merged value is not finite, and where `export_checkpoint` does.
    Example: `merge_adapter("Qwen/Qwen3-VL-2B-Instruct", "adapter", "merged")`.
    """
    return plan_merge(base, adapter, target, like=like, experts=experts).run(options, resume=resume)


def plan_merge(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    like: str | Path | None = None,
    experts: str | None = None,
) -> Merge:
    """What `merge_adapter` would do, verified from headers alone; arguments and errors are the same."""
    if is_megatron(Path(base)):
        plan = plan_export(base, target, like, ExportChoices(experts=experts))
    elif like is None:
        plan = _plan_copy(find_folder(base), Path(target), experts)
    else:
        raise UsageError(f"like: expected none for {base}, whose own files are kept, found {like}. Leave it out.")
    config, folder = read_config(plan.template.folder), Path(adapter)
    pairs = read_adapter(folder, base_shapes(config))
    delta = Delta(pairs, plan.plan.table, find(config).table(config, ExpertForm.FUSED_OUT_IN))
    writer, reads = plan.writer, plan.writer.reads

    def fill(region: Region, out: torch.Tensor) -> None:
        writer.fill(region, out)
        delta.add_into(region, out)

    changes = {
        "writer": SafetensorsWriter(
            writer.specs,
            writer.files,
            fill,
            replace(reads, scratch_bytes=reads.scratch_bytes + delta.scratch_bytes),
        ),
        "source_files": (*plan.source_files, folder / WEIGHTS, folder / CONFIG),
        "notes": (*plan.notes, f"merged into {listed(list(pairs))}"),
    }
    return Merge(**{**vars(plan), **changes})


def _plan_copy(folder: Path, target: Path, experts: str | None) -> Export:
    """The export of a Hugging Face folder as it is."""
    source = open_source(folder, experts=experts)
    weights, table = source.weights, source.table
    hf = {name: spec for name, spec in source.tensors.items() if name in table.hf_shapes}
    megatron, upcast = megatron_tensors(table, hf)
    template = ExportTemplate(
        folder, {name: (file, weights.table[name]) for name, file in weights.files.items()}, experts, weights
    )
    files, index = plan_files(weights.table, template)
    others = [name for name in weights.table if name not in hf and name != source.family.head]
    copied = [f"copied unchanged, as not part of the model: {listed(others)}"] if others else []
    return Export(
        architecture=source.family.architecture,
        source=folder,
        target=target,
        plan=Plan(table, hf, megatron, upcast=upcast, hf_source=str(folder)),
        writer=SafetensorsWriter(weights.table, files, weights.read_into),
        source_files=weights.paths,
        side_files=tuple(side_files(folder)),
        notes=(*weights.notes, *copied),
        options={"--experts": experts},
        template=template,
        tensors=weights.table,
        index=index,
        config_dtype=None,
        portable=None,
        quantization=None,
    )
