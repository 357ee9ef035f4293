"""Collectives with parts of different sizes, which Megatron's token dispatchers use and gloo lacks."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlbridge.errors import VLBridgeError


def install() -> None:
    """Replace torch's collectives, which are still called where all parts have one size."""
    dist.all_to_all_single = _all_to_all_single(dist.all_to_all_single)
    dist.all_gather = _all_gather(dist.all_gather)
    dist.reduce_scatter = _reduce_scatter(dist.reduce_scatter)


def set_batch_scheduling() -> None:
    """Put this process, and the threads and processes that it starts, under Linux's batch scheduling policy.

    gloo's thread polls without a pause while data has arrived that its rank does not read yet. Under the default policy
    it then preempts the ranks on its core: an all-reduce of four ranks on two cores takes four times as long. A policy
    that the user chose is kept.
    """
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _all_to_all_single(torchs: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the sizes also as tensors."""

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        sizes = (x.tolist() if isinstance(x, torch.Tensor) else x for x in (output_split_sizes, input_split_sizes))
        return torchs(output, input, *sizes, *args, **kwargs)

    return all_to_all_single


def _all_gather(torchs: Callable[..., Any]) -> Callable[..., Any]:
    def all_gather(
        tensor_list: Sequence[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if all(part.shape == tensor_list[0].shape for part in tensor_list):
            return torchs(tensor_list, tensor, group=group, async_op=async_op)
        _check_sync("all_gather", async_op)
        padded = tensor.new_zeros((max(map(len, tensor_list)), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        torchs(gathered, padded, group=group)
        for part, rows in zip(tensor_list, gathered, strict=True):
            part.copy_(rows[: len(part)])
        return None

    return all_gather


def _reduce_scatter(torchs: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_scatter(
        output: torch.Tensor,
        input_list: Sequence[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(part.shape == input_list[0].shape for part in input_list):
            return torchs(output, input_list, op=op, group=group, async_op=async_op)
        _check_sync("reduce_scatter", async_op)
        total = torch.cat(list(input_list))
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total.split([len(part) for part in input_list])[dist.get_rank(group)])
        return None

    return reduce_scatter


def _check_sync(name: str, async_op: bool) -> None:
    if async_op:
        raise VLBridgeError(f"CPU runtime: {name} of parts of different sizes is not supported with async_op=True")
