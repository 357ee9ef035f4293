"""The plan of an import, proved from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.conversion import Conversion, check_written, dtype_name
from megatron_vlbridge.checkpoint.dtypes import as_dtype, megatron_tensors
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.ignored import listed, read_notes
from megatron_vlbridge.checkpoint.hf.reader import SafetensorsFolder
from megatron_vlbridge.checkpoint.hf.side_files import side_files
from megatron_vlbridge.checkpoint.hf.source import open_source
from megatron_vlbridge.checkpoint.hf.template import keep_side_files
from megatron_vlbridge.checkpoint.stream.raw import gather_into
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.checkpoint.torch_dist.writer import ReleaseWriter
from megatron_vlbridge.weights import Plan, Region


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
        check=lambda folder: check_written(folder, TorchDistFolder(folder).table, megatron),
        notes=tuple(_import_notes(weights, source.left)),
        options={"--dtype": dtype_name(wanted), "--experts": experts, "--leave-out": list(leave_out)},
    )


def _import_notes(weights: SafetensorsFolder, left: Sequence[str]) -> Iterator[str]:
    yield from read_notes(weights)
    if left:
        yield f"left out, as no part of the model: {listed(left)}"
