"""Import and export: a Hugging Face folder <-> a Megatron `torch_dist` folder, bit for bit, without a model.

An imported folder keeps, in `hf/`, the source's other files unchanged and what its weights were called, so that an
export needs nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.safetensors import (
    DEFAULT_SHARD_BYTES,
    INDEX,
    SafetensorsFolder,
    load_json_object,
    plan_shards,
    row_blocks,
    write_folder,
)
from megatron_vlbridge.checkpoint.staging import staged_folder
from megatron_vlbridge.checkpoint.torch_dist import TorchDistFolder, write_release
from megatron_vlbridge.config import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import Family
from megatron_vlbridge.weights import Piece, Plan, Region, TensorSpec

SIDE_FOLDER = "hf"
FACTS = "vlbridge.json"

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Reader = Callable[[Region], torch.Tensor]


def import_checkpoint(
    hf_folder: str | Path, megatron_folder: str | Path, *, dtype: str | torch.dtype | None = None
) -> Path:
    """Write a Hugging Face checkpoint as a Megatron checkpoint, and return the new folder.

    The folder loads through Megatron's `--load` and `--pretrained-checkpoint` at any parallel layout. `dtype`
    (`"float32"`, `"bfloat16"`, `"float16"`) converts all weights; by default each keeps its own. Tensors are read when
    they are written.

    Raises VLBridgeError, and leaves nothing under the new name, when the two do not fit each other exactly, a file is
    missing or damaged, or the target exists.

    Example: `import_checkpoint("Qwen3-VL-2B-Instruct", "qwen3-vl-2b-megatron")`.
    """
    source, target = Path(hf_folder), Path(megatron_folder)
    config = read_config(source)
    family = families.find(config)
    table = family.table(config)
    weights = SafetensorsFolder(source)
    hf = dict(weights.table)
    if config.tie_word_embeddings and family.head in hf:
        check_tied_head(weights, family)
        del hf[family.head]
    wanted = _as_dtype(dtype)
    megatron = _derive_table(
        table.megatron_shapes, ((move.megatron.name, move.hf.name) for move in table.moves), hf, wanted
    )
    Plan(table, hf, megatron, cast=wanted is not None, hf_source=str(source), megatron_source="the new checkpoint")

    def read(region: Region) -> torch.Tensor:
        return gather(region, table.hf_sources(region), weights.read, megatron[region.name].dtype)

    with staged_folder(target) as work:
        write_release(work, megatron, read)
        side = work / SIDE_FOLDER
        copy_side_files(source, side)
        if (source / INDEX).is_file():
            shutil.copyfile(source / INDEX, side / INDEX)
        facts = {name: [file, str(weights.table[name].dtype)] for name, file in weights.files.items()}
        (side / FACTS).write_text(json.dumps({"version": 1, "tensors": facts}, indent=1) + "\n", encoding="utf-8")
    return target


def export_checkpoint(
    megatron_folder: str | Path,
    hf_folder: str | Path,
    *,
    like: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> Path:
    """Write the weights of a Megatron checkpoint as a Hugging Face checkpoint, and return the new folder.

    Config, tokenizer, processor and all other files come unchanged from what the import kept beside the weights, or
    from `like`, the Hugging Face folder that training started from; a folder that a training run wrote holds none.
    Shards are those of that source, or at most `max_shard_size` bytes each (5 GB where the source does not tell).
    `dtype` converts all weights; by default they keep what the Megatron checkpoint holds.

    Raises VLBridgeError, and leaves nothing under the new name, when the two do not fit each other exactly, a file is
    missing or damaged, the target exists, or it is not known which config belongs to the weights.

    Example: `export_checkpoint("run", "trained", like="Qwen3-VL-2B-Instruct")`.
    """
    source, target = Path(megatron_folder), Path(hf_folder)
    model = _find_like(source, like)
    config = read_config(model.folder)
    family = families.find(config)
    table = family.table(config)
    weights = TorchDistFolder(source)
    wanted = _as_dtype(dtype)
    pairs = ((move.hf.name, move.megatron.name) for move in table.moves)
    hf = _derive_table(table.hf_shapes, pairs, weights.table, wanted)
    Plan(table, hf, weights.table, cast=wanted is not None, hf_source=str(target), megatron_source=str(weights.folder))
    if config.tie_word_embeddings and family.head in model.tensors:
        hf[family.head] = hf[family.embedding]
    surplus = sorted(model.tensors.keys() - hf.keys())
    if surplus:
        raise VLBridgeError(
            f"{model.folder}: expected only tensors of a {family.architecture}, found {len(surplus)} more: "
            f"{', '.join(surplus[:8])}. Give a like= folder of the same architecture."
        )
    files, index = _shards(hf, model, max_shard_size)

    def read(region: Region) -> torch.Tensor:
        spec = hf[region.name]
        named = region if region.name in table.hf_shapes else Region(family.embedding, region.offset, region.shape)
        return gather(region, table.megatron_sources(named), weights.read, spec.dtype)

    with staged_folder(target) as work:
        write_folder(work, hf, files, read)
        copy_side_files(model.folder, work)
        if index is not None:
            shutil.copyfile(index, work / INDEX)
    return target


@dataclass(frozen=True)
class _Like:
    """Where an export takes the other files from, and what the weights there were called: tensor -> (file, dtype)."""

    folder: Path
    tensors: Mapping[str, tuple[str, str]]


def _find_like(source: Path, like: str | Path | None) -> _Like:
    if like is not None:
        folder = Path(like)
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.safetensors.index.json")):
            return _Like(folder, {})
        weights = SafetensorsFolder(folder)
        return _Like(folder, {name: (file, str(weights.table[name].dtype)) for name, file in weights.files.items()})
    for folder in (source / SIDE_FOLDER, source.resolve().parent / SIDE_FOLDER):
        if (folder / FACTS).is_file():
            return _Like(folder, _read_facts(folder / FACTS))
    raise VLBridgeError(
        f"{source}: expected {SIDE_FOLDER}/{FACTS}, as an import leaves it, found none (a training run keeps weights "
        "only). Give like=, the Hugging Face folder that the training started from."
    )


def _read_facts(path: Path) -> dict[str, tuple[str, str]]:
    tensors = load_json_object(path).get("tensors")
    result = {}
    for name, fact in tensors.items() if isinstance(tensors, dict) else ():
        if not isinstance(fact, list) or len(fact) != 2 or not all(isinstance(item, str) for item in fact):
            raise VLBridgeError(f"{path}: {name}: expected a file and a dtype, found {fact!r:.80}. Import again.")
        if "/" in fact[0] or not fact[0].endswith(".safetensors"):
            raise VLBridgeError(f"{path}: {name}: expected a plain safetensors name, found {fact[0]!r}. Import again.")
        result[name] = (fact[0], fact[1])
    if not result:
        raise VLBridgeError(f"{path}: tensors: expected names with their files, found {tensors!r:.80}. Import again.")
    return result


def _shards(
    hf: Mapping[str, TensorSpec], model: _Like, max_shard_size: int | None
) -> tuple[dict[str, str], Path | None]:
    """Tensor -> file, and the source's own index where it still says the truth about sizes and files."""
    if max_shard_size is not None and max_shard_size <= 0:
        raise VLBridgeError(f"max_shard_size: expected a positive number of bytes, found {max_shard_size}.")
    if max_shard_size is not None or model.tensors.keys() != hf.keys():
        return plan_shards(hf, max_shard_size or DEFAULT_SHARD_BYTES), None
    files = {name: file for name, (file, _) in model.tensors.items()}
    same_sizes = all(str(hf[name].dtype) == dtype for name, (_, dtype) in model.tensors.items())
    index = model.folder / INDEX
    return files, index if same_sizes and index.is_file() else None


def _derive_table(
    shapes: Mapping[str, tuple[int, ...]],
    pairs: Iterable[tuple[str, str]],
    sources: Mapping[str, TensorSpec],
    dtype: torch.dtype | None,
) -> dict[str, TensorSpec]:
    """The tensors to be written: the rules' shapes, and the dtype asked for or that of their (first) source."""
    dtypes: dict[str, torch.dtype] = {}
    for name, source in pairs:
        if source in sources:
            dtypes.setdefault(name, sources[source].dtype)
    return {name: TensorSpec(shape, dtype or dtypes.get(name, torch.float32)) for name, shape in shapes.items()}


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype if isinstance(dtype, torch.dtype) else None
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise VLBridgeError(f"dtype: expected one of {', '.join(_DTYPES)}, found {dtype!r}.")


def gather(region: Region, pieces: Iterable[Piece], read: Reader, dtype: torch.dtype) -> torch.Tensor:
    """A region put together from the other side's pieces, in `dtype`."""
    result = torch.empty(region.shape, dtype=dtype)
    for piece in pieces:
        result[piece.target.slices] = read(piece.source).reshape(piece.target.shape)
    return result


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


def copy_side_files(source: Path, target: Path) -> None:
    """Copy, unchanged, every file of a Hugging Face folder that is no weight: config, tokenizer, processor, licence."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        hidden_or_ours = path.name.startswith(".") or path.name == FACTS
        if path.is_file() and not hidden_or_ours and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
