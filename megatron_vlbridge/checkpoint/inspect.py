"""What is in a checkpoint: family, parameters by part, dtypes, pipeline stages, tensors."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.formats import is_megatron
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.reader import SafetensorsFolder
from megatron_vlbridge.checkpoint.pipeline_split import layer_ranges, split_arguments, split_layers
from megatron_vlbridge.checkpoint.run_manifest import read_unverified
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.checkpoint.verify import find_config
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.weights import TensorSpec

# The first pattern that a name matches, of either side's names, is its part.
_PARTS = (
    ("vision mergers", r"(visual|vision_model)\.(merger|deepstack_merger_list)\."),
    ("vision tower", r"(visual|vision_model)\."),
    ("MTP layer", r"(^|\.)mtp\."),
    ("experts", r"\.experts\."),
    ("output head", r"(^lm_head|\.output_layer)\."),
    ("embedding", r"\.(embed_tokens|word_embeddings)\."),
    ("decoder", r"language_model|^model\."),
)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's headers, read. `kind` is `hugging face` or `megatron`; `config` is None where none is kept.

    `table` has the Hub's names, and FP8 weights as the bfloat16 ones that they stand for; `notes` lists how the files
    differ from that. `unverified` are settings of the runs that trained it which no test verifies.
    """

    folder: Path
    kind: str
    config: Config | None
    table: Mapping[str, TensorSpec]
    notes: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, int]:
        """The number of elements of each part."""
        counts: Counter[str] = Counter()
        others = set(families.find(self.config).find_other_tensors(self.table)) if self.config else set()
        for name, spec in self.table.items():
            part = next((part for part, pattern in _PARTS if name not in others and re.search(pattern, name)), "other")
            counts[part] += spec.nbytes // spec.dtype.itemsize
        return dict(counts)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype."""
        return dict(Counter(str(spec.dtype).removeprefix("torch.") for spec in self.table.values()))

    @property
    def layers(self) -> dict[str, int]:
        """How many decoder layers are of each kind; empty where no config is known."""
        return dict(Counter(map(str, self.config.text.layer_kinds))) if self.config else {}

    def stages(self, pp: int) -> list[range]:
        """The decoder layers of each pipeline stage, split as evenly as Megatron can (`pipeline_split.py`).

        Raises UsageError where there are fewer layers than stages, and VLBridgeError where no config is known.
        """
        if self.config is None:
            raise VLBridgeError(f"{self.folder}: expected a config to count the layers by, found none.")
        layers = self.config.text.num_layers
        if not 1 <= pp <= layers:
            raise UsageError(f"{self.folder}: pp: expected 1 to {layers} stages for {layers} layers, found {pp}.")
        return layer_ranges(split_layers(layers, pp))

    def as_json(self, pp: int | None = None) -> dict[str, Any]:
        """Everything, in JSON's types; sizes in bytes."""
        result: dict[str, Any] = {
            "folder": str(self.folder),
            "kind": self.kind,
            "architecture": self.config.architecture if self.config else None,
            "bytes": sum(spec.nbytes for spec in self.table.values()),
            "parameters": {"total": sum(self.parameters.values()), **self.parameters},
            "layers": self.layers,
            "dtypes": self.dtypes,
            "notes": list(self.notes),
            "unverified": list(self.unverified),
            "tensors": {
                name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
                for name, spec in self.table.items()
            },
        }
        if pp is not None:
            stages = self.stages(pp)
            result["stages"] = [[stage.start, stage.stop] for stage in stages]
            result["arguments"] = split_arguments(list(map(len, stages)))
        return result


def inspect(name: str | Path) -> Inspection:
    """Read the headers of a Hugging Face folder (or Hub id) or of a Megatron folder.

    Raises VLBridgeError where they are damaged, or the config belongs to no supported family.
    Example: `inspect("Qwen/Qwen3-VL-2B-Instruct").parameters["vision tower"]`.
    """
    config = find_config(name)
    if is_megatron(Path(name)):
        weights = TorchDistFolder(name)
        unverified = read_unverified(weights.folder)
        return Inspection(weights.folder, "megatron", config, weights.table, unverified=unverified)
    folder = find_folder(name)
    hf = SafetensorsFolder(folder)
    return Inspection(folder, "hugging face", config, hf.table, tuple(hf.notes))


def _stage_lines(stages: Sequence[range]) -> Iterator[str]:
    for index, stage in enumerate(stages):
        yield f"  stage {index}: layers {stage.start} to {stage.stop - 1}"
    if arguments := split_arguments(list(map(len, stages))):
        yield f"  {stages[-1].stop} layers do not divide by {len(stages)}: give Megatron {' '.join(arguments)}"


def table_lines(found: Inspection, pp: int | None = None) -> list[str]:
    """The inspection for people."""
    total = sum(found.parameters.values())
    nbytes = sum(spec.nbytes for spec in found.table.values())
    architecture = found.config.architecture if found.config else "architecture unknown: no config.json beside it"
    dtypes = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in found.dtypes.items())
    lines = [
        f"{found.folder}: {found.kind}, {architecture}",
        f"{total:,} parameters, {nbytes / 1e9:.3f} GB, {dtypes}",
        *(f"{count} layers with {kind}" for kind, count in found.layers.items()),
        *found.notes,
        *([f"unverified settings: {', '.join(found.unverified)}"] if found.unverified else []),
        *(f"  {part:<16}{count:>18,}" for part, count in found.parameters.items()),
    ]
    if pp is not None:
        lines += _stage_lines(found.stages(pp))
    width = max(map(len, found.table), default=0)
    return lines + [f"{name:<{width}}  {spec}" for name, spec in found.table.items()]
