"""A micro-batch on every rank that needs it, with what each pipeline stage needs of it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.model.inputs import Media, PackedInputs

# The keys of a pack; a data loader puts an axis of one micro-batch before each of them.
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


def next_inputs(
    data_iterator: Iterator[Mapping[str, Any]] | None,
    config: Config,
    pg_collection: ProcessGroupCollection,
    *,
    pre_process: bool,
    post_process: bool,
    sequence_parallel: bool = False,
) -> PackedInputs:
    """The next pack, for one pipeline stage, the same on all ranks of its tensor-parallel group.

    The group's first rank reads `data_iterator`; the others may have none, as Megatron's loaders leave it. The first
    stage gets the patches, the last the labels, every stage tokens' positions and the layout.

    Raises:
        VLBridgeError: on every rank of the group, where the pack is not fit; likewise whatever the iterator raises.
    """
    inputs: PackedInputs | None = None
    failure: Exception | None = None
    if pg_collection.tp.rank() == 0:
        try:
            inputs = read_pack(_next(data_iterator), config)
            inputs = inputs.context_parallel(pg_collection.cp.size(), pg_collection.cp.rank(), config)
            inputs = _for_stage(inputs, pre_process, post_process)
        except Exception as error:  # noqa: BLE001  the other ranks wait for this one: they must hear of anything
            failure = error
    device = torch.device(torch.cuda.current_device())
    if pg_collection.tp.size() > 1:
        inputs, failure = _broadcast(inputs, failure, pg_collection.tp, device)
    if failure is not None:
        raise failure
    assert inputs is not None
    if sequence_parallel:
        # Before the move: the number of rows is known without asking the device.
        inputs = inputs.sequence_parallel(pg_collection.tp.size(), pg_collection.tp.rank())
    return inputs.to(device)


def read_pack(batch: Mapping[str, Any], config: Config) -> PackedInputs:
    """A data loader's micro-batch (every tensor with a leading axis of 1) as the model's inputs.

    Raises:
        VLBridgeError: where a key is missing or unknown, the micro-batch is not one pack, or its parts do not fit.
    """
    missing, unknown = [key for key in PACK_KEYS if key not in batch], sorted(set(batch) - set(PACK_KEYS))
    if missing or unknown:
        raise VLBridgeError(f"a micro-batch has the keys {list(PACK_KEYS)}; missing: {missing}, unknown: {unknown}")
    _refuse_other_than_tensors(batch)
    shapes = {key: list(batch[key].shape) for key in PACK_KEYS}
    if any(shape[:1] != [1] for shape in shapes.values()):
        raise VLBridgeError(
            f"a micro-batch is one pack, so every tensor has a leading axis of 1; found {shapes}. "
            "Use --micro-batch-size 1 and a longer --seq-length"
        )
    pack = {key: batch[key][0] for key in PACK_KEYS}
    if pack["labels"].shape != pack["tokens"].shape:
        raise VLBridgeError(
            f"labels {list(pack['labels'].shape)} and tokens {list(pack['tokens'].shape)} differ in shape"
        )
    layout = BatchLayout.packed(pack["segment_lengths"].tolist(), pack["tokens"].shape[0])
    media = Media(**{key: pack[key] for key in PACK_KEYS[3:]})
    return PackedInputs.from_pack(layout, pack["tokens"][None], media, config, pack["labels"][None])


def _refuse_other_than_tensors(batch: Mapping[str, Any]) -> None:
    """Patches are floating-point tensors, everything else integers; patches and grids are tables."""
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
        raise VLBridgeError(f"{key} of a micro-batch: expected a {kind} tensor of {dimensions} dims, found {found}")


def _next(data_iterator: Iterator[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    if data_iterator is None:
        raise VLBridgeError(
            "the first rank of a tensor-parallel group has no data iterator; "
            "Megatron gives it one when the dataset provider returns a dataset on that rank"
        )
    return next(data_iterator)


def _no_patches(inputs: PackedInputs) -> torch.Tensor:
    # A slice would keep all of them in memory, and take them along where it is pickled.
    return inputs.patches.new_empty(0, *inputs.patches.shape[1:])


def _for_stage(inputs: PackedInputs, pre_process: bool, post_process: bool) -> PackedInputs:
    if not pre_process:
        inputs = replace(inputs, patches=_no_patches(inputs))
    if not post_process:
        inputs = replace(inputs, labels=None, mtp=inputs.mtp and inputs.mtp.without_labels())
    return inputs


def _broadcast(
    inputs: PackedInputs | None, failure: Exception | None, group: dist.ProcessGroup, device: torch.device
) -> tuple[PackedInputs | None, Exception | None]:
    """The first rank's inputs or failure, on all ranks of `group`: patches as a tensor, all else in a header."""
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
