"""Ranks that read packs on their own compare them: a dataset out of step is an error on all of them, not a hang."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.inputs.digest import PackDigest

REMEDY = (
    "Pipeline stages and context-parallel ranks of a data-parallel rank must read the same packs in the same order: "
    "give their datasets the same files, seed and position, and choose samples by the data-parallel rank alone"
)


def common_failure(digest: PackDigest | None, failure: Exception | None, group: dist.ProcessGroup) -> Exception | None:
    """Why no rank of `group` may use the pack that it read: one rank failed to read, or they read different packs.

    Collective over the group: a few bytes where all is well.
    """
    if group.size() == 1:
        return failure
    state = torch.tensor([-1 if digest is None else digest.value], device=_device())
    states = [torch.empty_like(state) for _ in range(group.size())]
    dist.all_gather(states, state, group=group)
    values = torch.cat(states).tolist()
    if len(set(values)) == 1 and digest is not None:
        return None
    read: list[tuple[PackDigest | None, Exception | None]] = gather((digest, failure), group)
    if failures := [theirs for _, theirs in read if theirs is not None]:
        return failure or failures[0]
    digests = {f"context-parallel rank {rank}": [digest] for rank, (digest, _) in enumerate(read) if digest is not None}
    return VLBridgeError(difference(digests) or "")


def difference(read: Mapping[str, Sequence[PackDigest]]) -> str | None:
    """The first pack in which readers, by name, differ from the first of them; None if they have read the same."""
    (first, expected), *others = read.items()
    for name, found in others:
        for index, (theirs, mine) in enumerate(zip(found, expected, strict=False)):
            if parts := theirs.differences(mine):
                return (
                    f"{name} and {first} read different packs: micro-batch {index} since they last agreed differs in "
                    f"{', '.join(parts)}; {name} has {theirs}, {first} has {mine}. {REMEDY}"
                )
        if len(found) != len(expected):
            return f"{name} has read {len(found)} packs, {first} {len(expected)}. {REMEDY}"
    return None


def gather[T](value: T, group: dist.ProcessGroup) -> list[T]:
    """What each rank of `group` passes, in their order. It is pickled: for small values only."""
    values: list[Any] = [value] * group.size()
    if group.size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def largest(values: Sequence[int], group: dist.ProcessGroup) -> list[int]:
    """The largest of each of the integers over the ranks of `group`."""
    if group.size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    found: list[int] = tensor.tolist()
    return found


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())
