"""Chunks of a model seen with their adapters added to the weights; the model itself is not changed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from megatron_vlbridge.checkpoint.live.collectives import raise_on_all_ranks
from megatron_vlbridge.checkpoint.live.shards import Model, is_adapter, modules_of, sharded_tensors
from megatron_vlbridge.checkpoint.live.weights import sync_parameters
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.lora.adapter import Adapter, GroupedAdapter


class MergedChunk:
    """A chunk whose `base_sharded_state_dict` has `W + scaling * B A` in place of W, in memory of its own.

    The sum is made in fp32 and rounded to the dtype of W; of experts B A is rounded before, too, as by `peft` 0.21. It
    takes the bytes of the weights that have adapters.
    """

    def __init__(self, chunk: Any) -> None:
        self.chunk, self.hf_config = chunk, chunk.hf_config
        self._merged = dict(_merged_weights(chunk))

    def base_sharded_state_dict(self) -> list[Any]:
        """The shards of all weights of the checkpoint."""
        weights = {parameter: parameter.data for parameter in self._merged}
        try:
            for parameter, values in self._merged.items():
                parameter.data = values
            shards = sharded_tensors(self.chunk.base_sharded_state_dict())
            # The shards that Megatron gives may hold the parameters, which get their own values again.
            return [replace(shard, data=shard.data.detach()) for shard in shards]
        finally:
            for parameter, values in weights.items():
                parameter.data = values

    sharded_state_dict = base_sharded_state_dict


def merged_chunks(model: Model) -> list[Any]:
    """The chunks of a model with their adapters merged.

    Raises VLBridgeError, on all ranks, for adapters of others, whose arithmetic is not known, and for sums that the
    dtype of the weight cannot hold.
    """
    sync_parameters(model)
    with raise_on_all_ranks():
        _reject_others(model)
        return [MergedChunk(chunk) for chunk in modules_of(model)]


def _reject_others(model: Model) -> None:
    for chunk in modules_of(model):
        foreign = [name for name, _ in chunk.named_parameters() if is_adapter(name) and "_lora." not in name]
        if foreign:
            raise VLBridgeError(
                f"merge_adapter_weights=True: expected adapters of add_lora, found {foreign[0]} of another library. "
                "Use add_lora in a pre-wrap hook, or export with merge_adapter_weights=False."
            )


@torch.no_grad()
def _merged_weights(chunk: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    for name, module in chunk.named_modules():
        if isinstance(module, Adapter) and name.endswith("_lora"):
            yield _merged(name, chunk.get_submodule(name.removesuffix("_lora")).weight, module)
        elif isinstance(module, GroupedAdapter):
            layer = chunk.get_submodule(name.removesuffix("_lora"))
            for index, adapter in enumerate(module.experts):
                yield _merged(name, getattr(layer, f"weight{index}"), adapter)


def _merged(name: str, weight: Any, adapter: Any) -> tuple[torch.nn.Parameter, torch.Tensor]:
    """This rank's rows and columns of A and B give those of the sum."""
    blocks = [
        b.float() @ adapter.matrix(part, "A").float()
        for part in adapter.parts
        if (b := adapter.matrix(part, "B")) is not None
    ]
    delta = torch.cat(blocks) if blocks else weight.new_zeros(0, weight.shape[1], dtype=torch.float32)
    if adapter.order is not None:
        delta = pad(delta, (0, 0, 0, 1))[adapter.order]  # a row of zeros for what has no adapter
    delta *= adapter.scaling
    if adapter.parts[0].experts is not None:
        delta = delta.to(weight.dtype).float()
    merged = (weight.float() + delta).to(weight.dtype)
    if not merged.isfinite().all():
        raise VLBridgeError(
            f"{name}: expected a sum of weight and adapter that {weight.dtype} holds, found "
            f"{merged[~merged.isfinite()][0].item()}. Export with merge_adapter_weights=False, or use "
            "another dtype."
        )
    return weight, merged
