"""The plan of an import, verified from headers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.conversion import Conversion, check_read_back, dtype_name
from megatron_vlbridge.checkpoint.dtypes import as_dtype, megatron_tensors
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.reader import listed
from megatron_vlbridge.checkpoint.hf.side_files import side_files
from megatron_vlbridge.checkpoint.hf.source import HfSource, open_source
from megatron_vlbridge.checkpoint.hf.template import keep_template
from megatron_vlbridge.checkpoint.stream.raw import gather_into
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.checkpoint.torch_dist.writer import ReleaseWriter
from megatron_vlbridge.weights import Plan, Region


@dataclass(frozen=True, kw_only=True)
class Import(Conversion):
    """Hugging Face -> Megatron. `experts` and `dtype` are what the user asked for."""

    kind = "import"
    hf: HfSource
    experts: str | None
    dtype: torch.dtype | None

    def complete(self, folder: Path) -> None:
        """Keep the source's other files, and what its weights were called."""
        keep_template(self.hf.weights, folder, self.experts, self.hf.ignored, self.dtype)

    def check(self, folder: Path) -> None:
        """Read the metadata back."""
        check_read_back(folder, TorchDistFolder(folder).table, self.plan.megatron)


def plan_import(
    hf_folder: str | Path,
    megatron_folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    ignore: Sequence[str] = (),
) -> Import:
    """What `import_checkpoint` would do, verified from headers alone; arguments and errors are the same."""
    source = open_source(find_folder(hf_folder), experts=experts, ignore=ignore)
    weights, table, hf = source.weights, source.table, source.tensors
    wanted = as_dtype(dtype)
    megatron, upcast = megatron_tensors(table, hf, wanted)
    plan = Plan(
        table,
        hf,
        megatron,
        cast=wanted is not None,
        upcast=upcast,
        hf_source=str(weights.folder),
        megatron_source="the new checkpoint",
    )

    ignored = [f"ignored, as not part of the model: {listed(source.ignored)}"] if source.ignored else []

    def fill(region: Region, out: torch.Tensor) -> None:
        gather_into(out, table.hf_sources(region), weights.read_into, hf)

    return Import(
        architecture=source.family.architecture,
        source=weights.folder,
        target=Path(megatron_folder),
        plan=plan,
        writer=ReleaseWriter(megatron, fill),
        source_files=weights.paths,
        side_files=tuple(side_files(weights.folder)),
        notes=(*weights.notes, *ignored),
        options={"--dtype": dtype_name(wanted), "--experts": experts, "--ignore": list(ignore)},
        hf=source,
        experts=experts,
        dtype=wanted,
    )
