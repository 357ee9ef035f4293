"""Are two checkpoints the same? Hugging Face or Megatron folders, bit by bit, through the rules, block by block."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.comparison import Difference, Report, config_differences
from megatron_vlbridge.checkpoint.dtypes import megatron_tensors
from megatron_vlbridge.checkpoint.formats import is_megatron
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.reader import SafetensorsFolder
from megatron_vlbridge.checkpoint.hf.side_files import SIDE_FOLDER
from megatron_vlbridge.checkpoint.hf.source import check_scales, check_tied_head
from megatron_vlbridge.checkpoint.stream.parts import row_blocks
from megatron_vlbridge.checkpoint.stream.raw import Filler, gather_into
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.config import Config
from megatron_vlbridge.families import read_config
from megatron_vlbridge.families.experts import has_single_experts
from megatron_vlbridge.weights import Plan, Region, RuleTable, TensorSpec
from megatron_vlbridge.weights.plan import any_dtype

_BLOCK_BYTES = 16 * 2**20
_HF_UNIT = "Hugging Face tensors"

Tensors = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class _Side:
    """One checkpoint as Megatron or as Hugging Face tensors, and what else a Hugging Face folder holds.

    `mixed` are tensors whose values have several dtypes in the folder, so that no single tensor equals them.
    """

    folder: Path
    table: Tensors
    fill: Filler
    config: Config | None
    mixed: frozenset[str] = frozenset()
    unit: str = "Megatron tensors"


@dataclass(frozen=True)
class _HuggingFace:
    """A Hugging Face folder: the tensors of the `model`, by its own `rules`, and `others`."""

    folder: Path
    config: Config
    rules: RuleTable
    model: Tensors
    others: Tensors
    read: Filler


def verify(
    a: str | Path,
    b: str | Path,
    *,
    ignore: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    experts: str | None = None,
) -> Report:
    """Compare two checkpoints, each a Hugging Face folder (or Hub id) or a Megatron folder, bit for bit.

    Two Hugging Face folders are compared by their own tensors, all others as Megatron tensors, so names, shards,
    layouts, forms of experts and rows that pad the vocabulary do not matter; values and dtypes do. Weights in FP8 are
    compared as the bfloat16 values that they stand for.
    Optimizer state is skipped, and so are tensors of Hugging Face folders that match the patterns `ignore`, such as an
    import ignored (`leave_out` is its former name), and, against a Megatron folder, those that an import leaves out.
    Where a config is known on both sides, its architecture and sizes are compared.
    `experts` (an `ExpertForm`) is the form of fused experts in Hugging Face folders, where their shapes do not tell.

    Raises VLBridgeError where a folder is damaged or does not fit its own config.
    Example: `verify("Qwen/Qwen3-VL-2B-Instruct", "qwen3-vl-2b-megatron").equal`.
    """
    left, right = _open_both(a, b, [*ignore, *leave_out], experts)
    differences = []
    if left.config is not None and right.config is not None:
        for name, ours, theirs in config_differences(left.config, right.config):
            differences.append(Difference(f"config.json: {name}", f"{ours} and {theirs}"))
    differences += _compare_tables(left, right)
    names = [name for name, spec in left.table.items() if right.table.get(name) == spec]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda name: _compare(name, left.table[name], left, right), names)
        differences += [difference for difference in found if difference is not None]
    nbytes = sum(left.table[name].nbytes for name in names)
    return Report(str(left.folder), str(right.folder), len(names), nbytes, tuple(differences), unit=left.unit)


def find_config(name: str | Path) -> Config | None:
    """The config of a folder; a folder that a training run wrote has none."""
    folder = Path(name)
    if not is_megatron(folder):
        return read_config(find_folder(name))
    for place in (folder / SIDE_FOLDER, folder.resolve().parent / SIDE_FOLDER):
        if (place / "config.json").is_file():
            return read_config(place)
    return None


def _open_both(a: str | Path, b: str | Path, ignore: Sequence[str], experts: str | None) -> tuple[_Side, _Side]:
    if is_megatron(Path(a)) or is_megatron(Path(b)):
        config = find_config(a) or find_config(b)
        return _open(a, config, ignore, experts), _open(b, config, ignore, experts)
    left, right = (_read_hf(find_folder(name), ignore, experts) for name in (a, b))
    alike = not any(config_differences(left.config, right.config))
    return _as_hf(left, left.rules), _as_hf(right, left.rules if alike else right.rules)


def _open(name: str | Path, config: Config | None, ignore: Sequence[str], experts: str | None) -> _Side:
    if not is_megatron(Path(name)):
        return _as_megatron(_read_hf(find_folder(name), ignore, experts))
    weights = TorchDistFolder(name)
    own = find_config(name)
    known = own or config
    if known is None:  # two folders of training runs: compared as they are, padding included
        return _Side(weights.folder, weights.table, weights.read_into, None)
    table = families.find(known).table(known)
    hf = any_dtype(table.hf_shapes)
    Plan(table, hf, weights.table, cast=True, hf_source="the config", megatron_source=str(weights.folder))
    found = {name: TensorSpec(shape, weights.table[name].dtype) for name, shape in table.megatron_shapes.items()}
    return _Side(weights.folder, found, weights.read_into, own)


def _read_hf(folder: Path, ignore: Sequence[str], experts: str | None) -> _HuggingFace:
    config = read_config(folder)
    family = families.find(config)
    weights = SafetensorsFolder(folder)
    check_scales(config, weights)
    asked = None if has_single_experts(weights.table, family.layers) else experts
    table = family.table_for(config, weights.table, asked)
    ignored = {name for name in weights.table if any(fnmatchcase(name, pattern) for pattern in ignore)}
    hf = {name: spec for name, spec in weights.table.items() if name not in ignored or name in table.hf_shapes}
    if config.tie_word_embeddings and family.head in hf:
        check_tied_head(weights, family)
        del hf[family.head]
    others = {name: spec for name, spec in hf.items() if name not in table.hf_shapes}
    known = {name: spec for name, spec in hf.items() if name not in others}
    found, upcast = megatron_tensors(table, known)
    Plan(table, known, found, upcast=upcast, hf_source=str(folder), megatron_source="the rules")
    return _HuggingFace(folder, config, table, known, others, weights.read_into)


def _as_megatron(hf: _HuggingFace) -> _Side:
    found, _ = megatron_tensors(hf.rules, hf.model)
    left_out = families.find(hf.config).find_other_tensors(hf.others)
    others = {name: spec for name, spec in hf.others.items() if name not in left_out}
    return _Side(hf.folder, {**found, **others}, _through(hf.rules, hf.read), hf.config)


def _as_hf(hf: _HuggingFace, rules: RuleTable) -> _Side:
    """The folder's own tensors, or, where other rules hold experts in another form, its values as tensors of those."""
    if rules.rules == hf.rules.rules:
        return _Side(hf.folder, {**hf.model, **hf.others}, hf.read, hf.config, unit=_HF_UNIT)
    dtypes = {name: _dtypes(hf, rules, name) for name in rules.hf_shapes}
    mixed = frozenset(name for name, found in dtypes.items() if len(found) > 1)
    table = {
        name: TensorSpec(shape, torch.float32 if name in mixed else next(iter(dtypes[name])))
        for name, shape in rules.hf_shapes.items()
    }
    megatron = _through(hf.rules, hf.read)

    def fill(region: Region, out: torch.Tensor) -> None:
        if region.name in rules.hf_shapes:
            gather_into(out, rules.megatron_sources(region), megatron)
        else:
            hf.read(region, out)

    return _Side(hf.folder, {**table, **hf.others}, fill, hf.config, mixed, _HF_UNIT)


def _dtypes(hf: _HuggingFace, rules: RuleTable, name: str) -> set[torch.dtype]:
    """The dtypes that the values of a tensor of other rules have in the folder."""
    pieces = rules.megatron_sources(Region.whole(name, rules.hf_shapes[name]))
    return {hf.model[source.source.name].dtype for piece in pieces for source in hf.rules.hf_sources(piece.source)}


def _through(table: RuleTable, read: Filler) -> Filler:
    def fill(region: Region, out: torch.Tensor) -> None:
        if region.name in table.megatron_shapes:
            gather_into(out, table.hf_sources(region), read)
        else:
            read(region, out)

    return fill


def _compare_tables(left: _Side, right: _Side) -> Iterable[Difference]:
    for name in sorted(left.table.keys() | right.table.keys()):
        ours, theirs = left.table.get(name), right.table.get(name)
        if ours != theirs:
            yield Difference(name, f"{ours or 'absent'} and {theirs or 'absent'}")
        elif name in right.mixed:
            yield Difference(name, f"{ours} and values of several dtypes")


def _compare(name: str, spec: TensorSpec, left: _Side, right: _Side) -> Difference | None:
    """The first value that differs, and how many do."""
    count, first = 0, ""
    for region in row_blocks(Region.whole(name, spec.shape), spec.dtype.itemsize, _BLOCK_BYTES):
        ours, theirs = (torch.empty(region.shape, dtype=spec.dtype) for _ in range(2))
        left.fill(region, ours)
        right.fill(region, theirs)
        unequal = _bits(ours) != _bits(theirs)
        if not unequal.any():
            continue
        if not count:
            index = tuple(int(i) for i in unequal.view(region.shape).nonzero()[0])
            place = [a + b for a, b in zip(index, region.offset, strict=True)]
            first = f"first at {place}: {ours[index].item()!r} and {theirs[index].item()!r}"
        count += int(unequal.sum())
    return Difference(name, f"{count} of {Region.whole(name, spec.shape).volume} values, {first}") if count else None


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: zeros of either sign differ, and a NaN equals itself."""
    return tensor.view(-1).view(_INTEGERS[tensor.itemsize])


def first_lines(report: Report, shown: int = 10) -> list[str]:
    """The report for people: what was compared, and the first differences."""
    same = "the same" if report.equal else f"{len(report.differences)} differ"
    lines = [f"{report.a} and {report.b}: {report.compared} {report.unit}, {report.nbytes / 1e9:.3f} GB: {same}"]
    lines += [f"  {difference.name}: {difference.text}" for difference in report.differences[:shown]]
    if len(report.differences) > shown:
        lines.append(f"  and {len(report.differences) - shown} more")
    return lines
