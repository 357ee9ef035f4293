"""Which dtype each tensor has on either side: its own, unless the user asks for another.

A Megatron tensor holds many Hugging Face tensors (layers, q with k and v), which may differ in dtype. Where some are
float32 and others 16 bits it is float32, which holds all of them exactly, and an export restores each one's dtype.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.stream.raw import Filler, split
from megatron_vlbridge.config import WEIGHT_DTYPES
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.weights import Region, RuleTable, TensorSpec

Tensors = Mapping[str, TensorSpec]

_BY_NAME: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WEIGHT_DTYPES}
_HALVES = {torch.bfloat16, torch.float16}
_AT_ONCE = 2**20


def megatron_tensors(
    table: RuleTable, hf: Tensors, dtype: torch.dtype | None = None
) -> tuple[dict[str, TensorSpec], frozenset[str]]:
    """The Megatron tensors of an HF checkpoint, all in `dtype` if one is given, and the names of those upcast.

    Other dtypes that differ are rejected by the plan: here the first one counts.
    """
    found: dict[str, dict[torch.dtype, None]] = {}
    for move in table.moves:
        if move.hf.name in hf:
            found.setdefault(move.megatron.name, {})[hf[move.hf.name].dtype] = None
    mixed = {name for name, dtypes in found.items() if _are_mixed(dtypes.keys())} if dtype is None else set()
    own = {name: torch.float32 if name in mixed else next(iter(dtypes)) for name, dtypes in found.items()}
    specs = {
        name: TensorSpec(shape, dtype or own.get(name, torch.float32)) for name, shape in table.megatron_shapes.items()
    }
    return specs, frozenset(mixed)


def _are_mixed(dtypes: AbstractSet[torch.dtype]) -> bool:
    return len(dtypes) == 2 and torch.float32 in dtypes and bool(dtypes & _HALVES)


def hf_tensors(
    table: RuleTable, megatron: Tensors, like: Tensors, dtype: torch.dtype | None = None
) -> tuple[dict[str, TensorSpec], frozenset[str]]:
    """The HF tensors of a Megatron checkpoint, all in `dtype` if one is given, and the Megatron names of those upcast.

    They have the dtype of the Megatron tensor. Where that was upcast, they have the dtype that they have in `like`;
    this is the case where all Megatron tensors have the dtypes that an import of `like` gives them.
    """
    imported, upcast = megatron_tensors(table, like)
    same = all(megatron[name].dtype == spec.dtype for name, spec in imported.items() if name in megatron)
    if dtype is not None or not same:
        upcast = frozenset()
    dtypes: dict[str, torch.dtype] = {}
    for move in table.moves:
        name, source = move.hf.name, move.megatron.name
        if source in megatron:
            own = like[name].dtype if source in upcast and name in like else megatron[source].dtype
            dtypes.setdefault(name, own)
    specs = {
        name: TensorSpec(shape, dtype or dtypes.get(name, torch.float32)) for name, shape in table.hf_shapes.items()
    }
    return specs, upcast


def downcast_into(region: Region, out: torch.Tensor, fill: Filler) -> None:
    """Fill `out`, of 16 bits, with float32 values that it holds exactly.

    Raises VLBridgeError, naming the tensor, where it does not: the values were changed since they were upcast.
    """
    for offset, part in split(region.offset, out, _AT_ONCE):
        wide = torch.empty(part.shape, dtype=torch.float32)
        fill(Region(region.name, offset, tuple(part.shape)), wide)
        bits = wide.view(torch.int32)
        if part.dtype == torch.bfloat16:  # its bits are the upper half, also of NaNs
            part.copy_((bits >> 16).short().view(torch.bfloat16))
        else:
            part.copy_(wide)
        if not torch.equal(part.float().view(torch.int32), bits):
            raise VLBridgeError(
                f"{region.name}: expected float32 values that fit into {out.dtype}, which it had before the import, "
                "found others: they were trained since. Give --dtype (in Python: dtype=), one for all weights."
            )


def check_dtypes(folder: Path, table: Mapping[str, TensorSpec]) -> None:
    """Reject what no checkpoint of these models holds: integers, 8-bit values, both 16-bit dtypes at once."""
    for name, spec in table.items():
        if spec.dtype not in (torch.float64, *_BY_NAME.values()):
            raise VLBridgeError(
                f"{folder}: {name}: expected floating-point values of 16 bits or more, found {spec}. "
                "Quantised checkpoints are not supported; if it is not quantised, fetch the file again."
            )
    halves = {spec.dtype: name for name, spec in table.items() if spec.dtype.itemsize == 2}
    if len(halves) > 1:
        text = " and ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for dtype, name in halves.items())
        raise VLBridgeError(f"{folder}: expected one 16-bit dtype, found {text}. Fetch the files again.")


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a user asked for, None where weights keep their own. Raises UsageError for any other."""
    if dtype is None or dtype in _BY_NAME.values():
        return dtype if isinstance(dtype, torch.dtype) else None
    if isinstance(dtype, str) and dtype in _BY_NAME:
        return _BY_NAME[dtype]
    raise UsageError(f"dtype: expected one of {', '.join(_BY_NAME)}, found {dtype!r}.")
