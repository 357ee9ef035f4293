"""What lies beside the weights of a Hugging Face folder, and what an import keeps of it for the export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.hub import find_folder
from megatron_vlbridge.checkpoint.safetensors import INDEX, SafetensorsFolder, load_json_object
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import TensorSpec

SIDE_FOLDER = "hf"
FACTS = "vlbridge.json"

_QUANTISATION = "quantization_config"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True)
class Like:
    """Where an export takes the other files from, and how the weights were stored there: tensor -> (file, spec).

    `experts` is the form of the experts, where the user had to say it at the import. `weights` are the weights
    themselves, where they are there.
    """

    folder: Path
    tensors: Mapping[str, tuple[str, TensorSpec]]
    experts: str | None = None
    weights: SafetensorsFolder | None = None

    @property
    def index(self) -> Path | None:
        """The index file, where it says what the tensors are."""
        path = self.folder / INDEX
        return path if path.is_file() and (self.weights is None or self.weights.as_on_the_hub) else None

    @property
    def table(self) -> dict[str, TensorSpec]:
        """The tensors without their files."""
        return {name: spec for name, (_, spec) in self.tensors.items()}


def side_files(folder: Path) -> list[Path]:
    """Every file of a Hugging Face folder that is no weight: config, tokenizer, processor, licence."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in (FACTS, CHECKSUMS)
        if not path.name.endswith(_WEIGHT_FILES)
    ]


def copy_side_files(source: Path, target: Path) -> None:
    """Copy those files unchanged, but for a config that says that weights are quantised, as they no longer are."""
    target.mkdir(exist_ok=True)
    for path in side_files(source):
        config = load_json_object(path) if path.name == "config.json" else {}
        if config.pop(_QUANTISATION, None) is None:
            shutil.copyfile(path, target / path.name)
        else:
            text = json.dumps(config, indent=2, ensure_ascii=False)
            (target / path.name).write_text(text + "\n", encoding="utf-8")


def keep_side_files(weights: SafetensorsFolder, target: Path, experts: str | None, left: Collection[str] = ()) -> None:
    """Leave all that an export needs in the `hf` folder of an imported checkpoint, also the `experts` of the user.

    Nothing is noted of the tensors `left` out. The index is kept where it says what an export will hold.
    """
    side = target / SIDE_FOLDER
    copy_side_files(weights.folder, side)
    if (weights.folder / INDEX).is_file() and weights.as_on_the_hub and not left:
        shutil.copyfile(weights.folder / INDEX, side / INDEX)
    facts = {
        name: [file, str(weights.table[name].dtype), list(weights.table[name].shape)]
        for name, file in weights.files.items()
        if name not in left
    }
    content = {"version": 2, "experts": experts, "tensors": facts}
    (side / FACTS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def find_like(source: Path, like: str | Path | None) -> Like:
    """The Hugging Face side of an export: what the user named, which may be what an import left, or that of `source`.

    Raises VLBridgeError where there is neither, or the import's facts are damaged.
    """
    if like is not None:
        folder = find_folder(like)
        if (folder / FACTS).is_file():
            return _read_facts(folder)
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.safetensors.index.json")):
            return Like(folder, {})
        weights = SafetensorsFolder(folder)
        tensors = {name: (file, weights.table[name]) for name, file in weights.files.items()}
        return Like(folder, tensors, weights=weights)
    for folder in (source / SIDE_FOLDER, source.resolve().parent / SIDE_FOLDER):
        if (folder / FACTS).is_file():
            return _read_facts(folder)
    raise VLBridgeError(
        f"{source}: expected {SIDE_FOLDER}/{FACTS}, as an import leaves it, found none (a training run keeps weights "
        "only). Give like=, the Hugging Face folder that the training started from."
    )


def _read_facts(folder: Path) -> Like:
    path = folder / FACTS
    facts = load_json_object(path)
    tensors, experts = facts.get("tensors"), facts.get("experts")
    result = {}
    for name, fact in tensors.items() if isinstance(tensors, dict) else ():
        spec = _read_fact(fact)
        if spec is None:
            raise VLBridgeError(f"{path}: {name}: expected a file, dtype and shape, found {fact!r:.80}. Import again.")
        if "/" in fact[0] or not fact[0].endswith(".safetensors"):
            raise VLBridgeError(f"{path}: {name}: expected a plain safetensors name, found {fact[0]!r}. Import again.")
        result[name] = (fact[0], spec)
    if not result:
        raise VLBridgeError(f"{path}: tensors: expected names with their files, found {tensors!r:.80}. Import again.")
    if experts is not None and not isinstance(experts, str):
        raise VLBridgeError(f"{path}: experts: expected a form or null, found {experts!r:.80}. Import again.")
    return Like(folder, result, experts)


def _read_fact(fact: object) -> TensorSpec | None:
    if not isinstance(fact, list) or [type(item) for item in fact] != [str, str, list]:
        return None
    dtype = getattr(torch, fact[1].removeprefix("torch."), None)
    known = isinstance(dtype, torch.dtype) and all(type(size) is int and size >= 0 for size in fact[2])
    return TensorSpec(tuple(fact[2]), dtype) if known and isinstance(dtype, torch.dtype) else None
