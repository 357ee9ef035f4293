"""Filling a live, sharded Megatron model from a Hugging Face folder: each rank reads its own slices."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.comparison import config_differences
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.source import HfSource, open_source
from megatron_vlbridge.checkpoint.live.collectives import gather, raise_on_all_ranks
from megatron_vlbridge.checkpoint.live.shards import (
    Model,
    Shard,
    check_complete,
    has_value_head,
    is_adapter,
    modules_of,
    shards_of,
)
from megatron_vlbridge.checkpoint.stream.raw import gather_into
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.mtp import MEGATRON as MTP
from megatron_vlbridge.weights import Piece, Plan, Region
from megatron_vlbridge.weights.plan import any_dtype

_HEAD = "language_model.output_layer.weight"


@torch.no_grad()
def load_hf_weights(
    model: Model,
    folder: str | Path,
    *,
    experts: str | None = None,
    ignore: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    random_mtp: bool = False,
    value_head: bool = False,
) -> None:
    """Copy the weights of a Hugging Face folder (or Hub id) into a model that is already sharded, in place.

    `model` is what Megatron's `get_model` gives: one module, or the list of all chunks of this rank under virtual
    pipelining, wrapped or not. Its own `sharded_state_dict` says which slice of which tensor each rank holds; only
    those are read (of columns, also what lies between them in the file, up to 4 MiB at once), and converted to the
    dtype of the parameter. Rows that pad the vocabulary become zero. All ranks must call it. `experts` (an
    `ExpertForm`) says how the folder holds its experts where its tensors do not tell, `ignore` are patterns
    (`rotary.*`) for tensors that are not part of the model; `leave_out` is its former name. With `random_mtp` the MTP
    layer, which the config has and the folder has not, keeps the weights that the model was built with; with
    `value_head`, the same on all ranks, the head of a critic does, and the folder's embeddings may be tied or not.

    Raises VLBridgeError, on all ranks, when the folder does not match its config or the model's config, a slice has no
    source, a parameter is not filled or its dtype cannot hold its values, or a part of a weight of the folder (an
    expert, some rows) is on no rank.
    Example: `load_hf_weights(get_model(model_provider), "Qwen3-VL-2B-Instruct")`.
    """
    source, held = fill(model, folder, experts, [*ignore, *leave_out], random_mtp, value_head)
    everywhere = [region for regions in gather(held) for region in regions]
    if value_head and _HEAD in source.table.megatron_shapes:
        everywhere.append(Region.whole(_HEAD, source.table.megatron_shapes[_HEAD]))
    check_complete(source.table, everywhere, str(source.weights.folder))


@torch.no_grad()
def load_torch_dist_weights(model: Model, folder: str | Path) -> None:
    """Copy the weights of a `torch_dist` checkpoint into a model that is already sharded, in place.

    As `load_hf_weights`: of any layout, each rank reads its own regions, and adapters are passed over. Megatron's own
    loader takes those of a model with adapters alone. All ranks must call it.

    Raises VLBridgeError, on all ranks, when the checkpoint is damaged or does not have the weights of the model's
    config, a parameter cannot hold its values, or a weight is on no rank.
    Example: `load_torch_dist_weights(model, "qwen3-vl-8b-megatron")`.
    """
    held = []
    with raise_on_all_ranks():
        source, config = TorchDistFolder(folder), modules_of(model)[0].hf_config
        table = families.find(config).table_for(config)
        hf = any_dtype(table.hf_shapes)
        Plan(table, hf, source.table, cast=True, hf_source="the model", megatron_source=str(source.folder))
        for module in modules_of(model):
            shards = shards_of(module, table, str(source.folder))
            _check_every_parameter_is_filled(module, shards)
            for shard in shards:
                if shard.known != shard.region:
                    shard.values.zero_()
                if shard.known is not None:
                    whole = Piece(shard.known, Region.whole(shard.known.name, shard.known.shape))
                    gather_into(shard.known_values, [whole], source.read_into, source.table)
            held += [shard.known for shard in shards if shard.main and shard.known is not None]
    check_complete(table, [region for regions in gather(held) for region in regions], str(folder))


@torch.no_grad()
def fill(
    model: Model,
    folder: str | Path,
    experts: str | None = None,
    ignore: Sequence[str] = (),
    random_mtp: bool = False,
    value_head: bool = False,
) -> tuple[HfSource, list[Region]]:
    """Fill a model, or one chunk of it; gives what it was filled from, and the regions of its main shards.

    Collective, and raises VLBridgeError on all ranks, as `load_hf_weights`, which then looks for weights on no rank.
    """
    held = []
    with raise_on_all_ranks():
        folder = find_folder(folder)
        source = open_source(folder, experts=experts, ignore=ignore, random_mtp=random_mtp)
        table, megatron = source.table, any_dtype(source.table.megatron_shapes)
        Plan(table, source.tensors, megatron, cast=True, hf_source=str(folder), megatron_source="the model")
        kept = (MTP,) * random_mtp + (_HEAD,) * value_head
        for module in modules_of(model):
            tied = module.hf_config.tie_word_embeddings if value_head else source.config.tie_word_embeddings
            check_config(folder, replace(source.config, tie_word_embeddings=tied), module)
            if value_head and module.post_process and not has_value_head(module):
                raise VLBridgeError("value_head: expected the head of a critic, found that of a language model.")
            shards = shards_of(module, table, str(folder), kept)
            _check_every_parameter_is_filled(module, shards, kept)
            for shard in shards:
                _fill(shard, source)
            held += [shard.known for shard in shards if shard.main and shard.known is not None]
    return source, held


def check_config(folder: Path, config: Config, module: Any) -> None:
    """Reject a folder whose config is not the one that the model was built from."""
    lines = [
        f"{name}: expected {expected}, as the model was built, found {found}"
        for name, expected, found in config_differences(module.hf_config, config)
    ]
    if lines:
        text = lines[0] if len(lines) == 1 else f"{len(lines)} differences:\n  " + "\n  ".join(lines)
        end = ". " if len(lines) == 1 else "\n"
        raise VLBridgeError(f"{folder}: {text}{end}Build the model from this folder's config.")


def _check_every_parameter_is_filled(
    module: torch.nn.Module, shards: Sequence[Shard], kept: tuple[str, ...] = ()
) -> None:
    """Reject parameters whose memory is not that of their shards: no copy would reach them.

    Adapters and those whose names begin with one of `kept` are not filled.
    """
    sizes = {shard.values.data_ptr(): shard.values.numel() for shard in shards}
    addresses = sorted(sizes)
    for name, parameter in module.named_parameters():
        if is_adapter(name) or name.startswith(kept):
            continue
        start = parameter.data_ptr()
        inside = addresses[bisect_left(addresses, start) : bisect_left(addresses, start + parameter.nbytes)]
        found = sum(sizes[address] for address in inside)
        if found != parameter.numel():
            raise VLBridgeError(
                f"{name}: expected all {parameter.numel()} elements in the model's sharded_state_dict, found {found}. "
                "The module must describe each parameter there, in its own memory."
            )


def _fill(shard: Shard, source: HfSource) -> None:
    if shard.known != shard.region:
        shard.values.zero_()
    if shard.known is not None:
        pieces = source.table.hf_sources(shard.known)
        gather_into(shard.known_values, pieces, source.weights.read_into, source.tensors)
