"""The template of an export: the Hugging Face folder that it is made like, or what an import kept of one."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.reader import INDEX, SafetensorsFolder
from megatron_vlbridge.checkpoint.hf.side_files import MANIFEST, SIDE_FOLDER, copy_side_files
from megatron_vlbridge.checkpoint.stream.json_file import is_file_path, load_json_object
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import TensorSpec


@dataclass(frozen=True)
class ExportTemplate:
    """What an export looks like: the folder of the other files, and how it stores the weights: tensor -> (file, spec).

    `experts` is the form of the experts, where the user had to give it at the import, and `dtype` what all weights were
    converted to there. `weights` reads the weights of that folder, where it has them.
    """

    folder: Path
    tensors: Mapping[str, tuple[str, TensorSpec]]
    experts: str | None = None
    weights: SafetensorsFolder | None = None
    dtype: torch.dtype | None = None

    @property
    def index(self) -> Path | None:
        """The index file, where it describes the tensors as they are read."""
        path = self.folder / INDEX
        return path if path.is_file() and (self.weights is None or self.weights.as_on_the_hub) else None

    @property
    def table(self) -> dict[str, TensorSpec]:
        """The tensors without their files."""
        return {name: spec for name, (_, spec) in self.tensors.items()}

    def dtype_to_name(self, written: Mapping[str, TensorSpec]) -> torch.dtype | None:
        """What config.json is to name as the dtype of the `written` tensors; None where it is right as it is.

        It is that of most elements. A config whose weights keep their dtypes is right, whatever it names.
        """
        known = [(spec.dtype, self.tensors[name][1].dtype) for name, spec in written.items() if name in self.tensors]
        if known and self.dtype is None and all(ours == theirs for ours, theirs in known):
            return None
        elements: Counter[torch.dtype] = Counter()
        for spec in written.values():
            elements[spec.dtype] += math.prod(spec.shape)
        return elements.most_common(1)[0][0]


def keep_template(
    weights: SafetensorsFolder,
    target: Path,
    experts: str | None,
    ignored: Collection[str] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Keep all that an export needs in the `hf` folder of an imported checkpoint, also the user's `experts`, `dtype`.

    The `ignored` tensors are not in the manifest. The index is kept where it says what an export will hold.
    """
    side = target / SIDE_FOLDER
    copy_side_files(weights.folder, side, dtype)
    if (weights.folder / INDEX).is_file() and weights.as_on_the_hub and not ignored:
        shutil.copyfile(weights.folder / INDEX, side / INDEX)
    tensors = {
        name: [file, str(weights.table[name].dtype), list(weights.table[name].shape)]
        for name, file in weights.files.items()
        if name not in ignored
    }
    content = {"version": 2, "experts": experts, "dtype": dtype and str(dtype), "tensors": tensors}
    (side / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def find_template(source: Path, like: str | Path | None) -> ExportTemplate:
    """The template that the user named, which may be what an import kept, or that of `source`.

    Raises VLBridgeError where there is neither, or the import's manifest is damaged.
    """
    if like is not None:
        folder = find_folder(like)
        for place in (folder, folder / SIDE_FOLDER):
            if (place / MANIFEST).is_file():
                return _read_manifest(place)
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.safetensors.index.json")):
            return ExportTemplate(folder, {})
        weights = SafetensorsFolder(folder)
        tensors = {name: (file, weights.table[name]) for name, file in weights.files.items()}
        return ExportTemplate(folder, tensors, weights=weights)
    for folder in (source / SIDE_FOLDER, source.resolve().parent / SIDE_FOLDER):
        if (folder / MANIFEST).is_file():
            return _read_manifest(folder)
    raise VLBridgeError(
        f"{source}: expected {SIDE_FOLDER}/{MANIFEST}, as an import leaves it, found none (a training run keeps only "
        "weights). Give --like (in Python: like=), the Hugging Face folder that the training started from."
    )


def _read_manifest(folder: Path) -> ExportTemplate:
    path = folder / MANIFEST
    manifest = load_json_object(path)
    tensors, experts, dtype = manifest.get("tensors"), manifest.get("experts"), manifest.get("dtype")
    result = {}
    for name, entry in tensors.items() if isinstance(tensors, dict) else ():
        spec = _read_entry(entry)
        if spec is None:
            raise VLBridgeError(f"{path}: {name}: expected a file, dtype and shape, found {entry!r:.80}. Import again.")
        if not is_file_path(entry[0], ".safetensors"):
            raise VLBridgeError(
                f"{path}: {name}: expected the name of a safetensors file, found {entry[0]!r}. Import again."
            )
        result[name] = (entry[0], spec)
    if not result:
        raise VLBridgeError(f"{path}: tensors: expected names with their files, found {tensors!r:.80}. Import again.")
    if experts is not None and not isinstance(experts, str):
        raise VLBridgeError(f"{path}: experts: expected a form or null, found {experts!r:.80}. Import again.")
    if dtype is not None and _read_dtype(dtype) is None:
        raise VLBridgeError(f"{path}: dtype: expected one or null, found {dtype!r:.80}. Import again.")
    return ExportTemplate(folder, result, experts, dtype=_read_dtype(dtype))


def _read_entry(entry: object) -> TensorSpec | None:
    if not isinstance(entry, list) or [type(item) for item in entry] != [str, str, list]:
        return None
    dtype = _read_dtype(entry[1])
    known = all(type(size) is int and size >= 0 for size in entry[2])
    return TensorSpec(tuple(entry[2]), dtype) if known and dtype is not None else None


def _read_dtype(name: object) -> torch.dtype | None:
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None
