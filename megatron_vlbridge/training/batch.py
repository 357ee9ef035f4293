"""Read a micro-batch and distribute it to the ranks, with the parts that each pipeline stage needs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.model.inputs import GivenPositions, Media, PackedInputs
from megatron_vlbridge.model.inputs.digest import PackDigest
from megatron_vlbridge.training.media_guard.agreement import common_failure

# The keys of a pack; a data loader adds a leading dimension of 1.
PACK_KEYS = (
    "tokens",
    "labels",
    "segment_lengths",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "images_per_segment",
    "videos_per_segment",
)
# A pack may also have positions `[3, T]` (time, row, column), or `[T]` that count the tokens of each segment from 0,
# weights `[T]` of the labels, and what `PackedConversations` counts.
OPTIONAL_PACK_KEYS = ("position_ids", "loss_weights", "replaced_per_source")


def next_inputs(
    data_iterator: Iterator[Mapping[str, Any]] | None,
    config: Config,
    pg_collection: ProcessGroupCollection,
    *,
    pre_process: bool,
    post_process: bool,
    sequence_parallel: bool = False,
    check_position_ids: bool = False,
    note_pack: Callable[[Mapping[str, Any]], None] | None = None,
) -> PackedInputs:
    """The inputs of the next pack for one pipeline stage, identical on all ranks of its tensor-parallel group.

    The first rank of the group reads `data_iterator` and broadcasts; on the others it may be None, as with Megatron's
    data loaders. The first stage gets the patches, the last stage the labels, every stage the position ids and the
    layout. `note_pack` is called with a valid pack, where it is read.

    Raises VLBridgeError: the pack is invalid, or context-parallel ranks read different ones; raised on every rank of
    the tensor- and context-parallel groups, like any exception of the iterator.
    """
    inputs: PackedInputs | None = None
    failure: Exception | None = None
    if pg_collection.tp.rank() == 0:
        try:
            if data_iterator is None:
                raise VLBridgeError(
                    "the first rank of the tensor-parallel group has no data iterator; the dataset provider must "
                    "return a dataset on that rank"
                )
            batch = next(data_iterator)
            inputs = read_pack(batch, config, check_position_ids, with_patches=pre_process)
            if note_pack is not None:
                note_pack(batch)
            inputs = inputs.context_parallel(pg_collection.cp.size(), pg_collection.cp.rank(), config)
            if not pre_process:
                inputs = replace(inputs, patches=_no_patches(inputs))
            if not post_process:
                inputs = replace(inputs, labels=None, mtp=inputs.mtp and inputs.mtp.without_labels())
        except Exception as error:  # noqa: BLE001  the other ranks wait for the broadcast: they must receive any failure
            failure = error
        failure = common_failure(None if inputs is None else inputs.digest, failure, pg_collection.cp)
    device = torch.device(torch.cuda.current_device())
    if pg_collection.tp.size() > 1:
        inputs, failure = _broadcast(inputs, failure, pg_collection.tp, device)
    if failure is not None:
        raise failure
    assert inputs is not None
    if sequence_parallel:
        # Before the copy to the device, so that the number of rows is known without a synchronization.
        inputs = inputs.with_sequence_shard(pg_collection.tp.size(), pg_collection.tp.rank())
    return inputs.to(device)


def read_pack(
    batch: Mapping[str, Any], config: Config, check_position_ids: bool = False, with_patches: bool = True
) -> PackedInputs:
    """Convert a micro-batch of a data loader (all tensors with a leading dimension of 1) to model inputs.

    Its `position_ids`, if any, are used; `check_position_ids`: they must be those that are computed without. A stage
    without the tower needs no patches (`with_patches` False): its data loader may have decoded none.

    Raises VLBridgeError: a key is missing or unknown, the micro-batch is not one pack, or its tensors do not match.
    """
    missing = [key for key in PACK_KEYS if key not in batch]
    unknown = sorted(set(batch).difference(PACK_KEYS, OPTIONAL_PACK_KEYS))
    if missing or unknown:
        raise VLBridgeError(
            f"micro-batch: expected the keys {list(PACK_KEYS)} and optionally {list(OPTIONAL_PACK_KEYS)}; missing: "
            f"{missing}, unknown: {unknown}"
        )
    _check_tensors(batch)
    positions = GivenPositions.of(batch.get("position_ids"), check_position_ids)
    shapes = {key: list(value.shape) for key, value in batch.items() if value is not None}
    if any(shape[:1] != [1] for shape in shapes.values()):
        raise VLBridgeError(
            f"micro-batch: expected one pack, every tensor with a leading dimension of 1; found {shapes}. "
            "Use --micro-batch-size 1 and a larger --seq-length"
        )
    pack = {key: batch[key][0] for key in PACK_KEYS}
    if pack["labels"].shape != pack["tokens"].shape:
        raise VLBridgeError(
            f"expected labels and tokens of the same shape, found labels {list(pack['labels'].shape)} and tokens "
            f"{list(pack['tokens'].shape)}"
        )
    layout = BatchLayout.packed(pack["segment_lengths"].tolist(), pack["tokens"].shape[0])
    media = Media(**{key: pack[key] for key in PACK_KEYS[3:]}, patches_wanted=with_patches)
    weights = _loss_weights(batch.get("loss_weights"), layout.total)
    inputs = PackedInputs.from_pack(layout, pack["tokens"][None], media, config, pack["labels"][None], weights)
    inputs = inputs.with_positions(positions and _in_one_row(positions, layout.total))
    given = {"position_ids": None if positions is None else positions.ids, "loss_weights": weights}
    return replace(inputs, digest=PackDigest.of(pack | given))


def _loss_weights(given: Any, total: int) -> torch.Tensor | None:
    """`[1, T]` float32; a weight of 0 would be a supervised token without loss."""
    if given is None:
        return None
    if not isinstance(given, torch.Tensor) or not given.is_floating_point() or given.shape != (1, total):
        found = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise VLBridgeError(f"micro-batch, loss_weights: expected float32 [1, {total}], found {found}")
    wrong = (~(given.isfinite() & (given > 0))).nonzero()
    if len(wrong):
        place = int(wrong[0, 1])
        raise VLBridgeError(
            f"micro-batch, loss_weights: expected numbers above 0, found {float(given[0, place])} at token {place}; a "
            "token that is not learned has the label -100"
        )
    return given.float()


def _in_one_row(positions: GivenPositions, total: int) -> GivenPositions:
    """`[1, 3, T]` of a data loader -> `[3, 1, T]`; `[1, T]` is as it is."""
    if positions.ids.shape not in ((1, 3, total), (1, total)):
        raise VLBridgeError(
            f"position_ids: expected [1, 3, {total}] (time, row, column) or [1, {total}], as the pack has {total} "
            f"tokens, found {list(positions.ids.shape)}"
        )
    return replace(positions, ids=positions.ids.movedim(0, -2))


def _check_tensors(batch: Mapping[str, Any]) -> None:
    """Patches must be floating-point tensors, all others integer; patches and grids have 3 dims, all others 2."""
    for key in PACK_KEYS:
        value, patches = batch[key], key.startswith("pixel_values")
        dimensions = 3 if patches or key.endswith("_grid_thw") else 2
        if not isinstance(value, torch.Tensor):
            found = type(value).__name__
        elif value.is_floating_point() != patches or value.dim() != dimensions:
            found = f"{value.dtype} {list(value.shape)}"
        else:
            continue
        kind = "float32" if patches else "int64"
        raise VLBridgeError(f"micro-batch, {key}: expected a {kind} tensor with {dimensions} dims, found {found}")


def _no_patches(inputs: PackedInputs) -> torch.Tensor:
    # A slice would keep the whole storage alive, and pickle it.
    return inputs.patches.new_empty(0, *inputs.patches.shape[1:])


def _broadcast(
    inputs: PackedInputs | None, failure: Exception | None, group: dist.ProcessGroup, device: torch.device
) -> tuple[PackedInputs | None, Exception | None]:
    """Broadcast the inputs or the failure of the first rank of `group`: patches as a tensor, the rest in a header."""
    source = dist.get_process_group_ranks(group)[0]
    header: list[Any] = [failure, None, None]
    if inputs is not None:
        header = [failure, replace(inputs, patches=_no_patches(inputs)), inputs.patches.shape]
    dist.broadcast_object_list(header, src=source, group=group, device=device)
    failure, rest, shape = header
    if failure is not None:
        return None, failure
    patches = torch.empty(shape, device=device) if inputs is None else inputs.patches.to(device)
    if patches.numel():
        dist.broadcast(patches, src=source, group=group)
    return replace(rest, patches=patches), None
