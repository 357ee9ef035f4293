"""Packed (THD) batches, whole or already split among the context-parallel ranks by a framework."""

from collections.abc import Callable

import torch.distributed as dist

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.inputs.pack import PackedInputs
from megatron_vlbridge.model.inputs.thd_batch import ThdBatch
from megatron_vlbridge.model.inputs.thd_shard import RankStatus, ThdShard


def from_thd(make_batch: Callable[[], ThdBatch], config: Config, cp_group: dist.ProcessGroup) -> PackedInputs:
    """A packed batch as this context-parallel rank's inputs, whether the batch is whole or already split.

    One collective over `cp_group`, which every rank enters whatever its own batch is like, and another where positions
    of parts are compared; no token is exchanged. Every rank also receives the message of what `make_batch` raises.

    Raises VLBridgeError: on every rank of the group alike, where one rank's batch is invalid, the ranks have different
    segments or grids, or all placeholders together do not match the grids, or positions are not as expected.

    Example: `inputs = from_thd(lambda: ThdBatch(tokens, [0, 64, 96], media), config, cp_group)`.
    """
    size, rank = cp_group.size(), cp_group.rank()
    if size == 1:
        return ThdShard(make_batch(), config, 1, 0).inputs([RankStatus()])
    shard, statuses = _on_every_rank(lambda: ThdShard(make_batch(), config, size, rank), cp_group)
    inputs = shard.inputs(statuses)
    if shard.compares_positions:
        _on_every_rank(lambda: shard.with_compared_positions(statuses), cp_group)
    return inputs


def _on_every_rank(make: Callable[[], ThdShard], group: dist.ProcessGroup) -> tuple[ThdShard, list[RankStatus]]:
    """What `make` gives on this rank, and the statuses of all ranks; a failure of one is raised on every rank alike."""
    shard: ThdShard | None = None
    cause: Exception | None = None
    try:
        shard = make()
        status = shard.status
    except Exception as error:  # noqa: BLE001  the other ranks wait for this one: they must receive any failure
        cause = error
        status = RankStatus(failure=str(error) or type(error).__name__)
    size = group.size()
    statuses = [status] * size
    dist.all_gather_object(statuses, status, group=group)
    failures = [f"context-parallel rank {rank}: {s.failure}" for rank, s in enumerate(statuses) if s.failure]
    if failures:
        message = f"{len(failures)} of {size} context-parallel ranks cannot take their batch; " + "; ".join(failures)
        raise VLBridgeError(message) from cause
    assert shard is not None
    return shard, statuses
