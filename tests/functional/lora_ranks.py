"""What runs inside the workers: adapters out of live models and back, through folders of peft and Megatron's saver."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

from megatron_vlbridge.checkpoint.live import export_hf_weights, load_hf_weights
from megatron_vlbridge.checkpoint.live.adapters import export_adapter_weights, load_adapter, save_adapter
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.lora.attach import add_lora
from megatron_vlbridge.model.lora.entries import adapter_shards
from megatron_vlbridge.model.vlm import Qwen3VLModel
from tests.functional import ranks
from tests.functional.pool import Layout

Settings = Mapping[str, Any]


def out(layout: Layout, folder: Path, lora: Settings, target: Path, saved: Path) -> dict[str, Any]:
    """Adapters attached before the base is loaded; then both come out, and Megatron saves the adapters."""
    chunks = ranks.build_chunks(layout, folder, load=False, lora=lora)
    load_hf_weights(chunks, folder)
    save_adapter(chunks, target, "base")
    _save(chunks, saved)
    return {
        "base": list(export_hf_weights(chunks)),
        "all": list(export_adapter_weights(chunks)),
        "first": list(export_adapter_weights(chunks, ranks="first")),
        "trained": sorted(name for chunk in chunks for name, p in chunk.named_parameters() if p.requires_grad),
    }


def back(layout: Layout, folder: Path, settings: Settings, target: Path, saved: Path) -> dict[str, Any]:
    """The adapters of new models, from the folder of peft and from Megatron's checkpoint."""
    from_peft, from_saved = (ranks.build_chunks(layout, folder, load=False) for _ in range(2))
    for chunk in (*from_peft, *from_saved):
        add_lora(chunk, **settings)
    load_adapter(from_peft, target)
    state = dist_checkpointing.load(ranks._sharded(from_saved), str(saved))
    for number, chunk in enumerate(from_saved):
        chunk.load_state_dict(state[f"model{number}"])
    try:
        from_saved[0].load_state_dict({**state["model0"], "another": torch.zeros(1)})
        refused = ""
    except VLBridgeError as error:
        refused = str(error)
    return {"refused": refused} | {
        name: [shard for chunk in chunks for shard in ranks.weight_shards(chunk)]
        for name, chunks in (("peft", from_peft), ("saved", from_saved))
    }


def _save(chunks: Sequence[Qwen3VLModel], saved: Path) -> None:
    if torch.distributed.get_rank() == 0:
        saved.mkdir()
    torch.distributed.barrier()
    get_write_results_queue(mp_mode="fork")
    dist_checkpointing.save(ranks._sharded(chunks), str(saved))


def start(layout: Layout, folder: Path, settings: Settings) -> list[ranks.Shard]:
    """The adapters that a training starts with."""
    chunks = ranks.build_chunks(layout, folder, load=False)
    for chunk in chunks:
        add_lora(chunk, **settings)
    return [shard for chunk in chunks for shard in ranks.weight_shards(chunk)]


class Foreign(torch.nn.Module):
    """A wrapper as Megatron-Bridge puts it around a linear layer: the layer, and beside it its `adapter`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.to_wrap = layer
        self.adapter = torch.nn.Linear(2, 3)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        entries: dict[str, Any] = self.to_wrap.sharded_state_dict(prefix, *args, **kwargs)
        key = f"{prefix}adapter.weight"
        return entries | {key: ShardedTensor.from_rank_offsets(key, self.adapter.weight)}


def foreign(layout: Layout, folder: Path) -> list[tuple[str, torch.Tensor]]:
    """The base weights through a model with adapters of others."""
    chunks = ranks.build_chunks(layout, folder, load=False)
    for chunk in chunks:
        for layer in chunk.language_model.decoder.layers:
            layer.self_attention.linear_proj = Foreign(layer.self_attention.linear_proj)
    load_hf_weights(chunks, folder)
    return list(export_hf_weights(chunks))


def refusals(
    layout: Layout, folder: Path, settings: Settings, calls: Sequence[tuple[str, Any]], **overrides: Any
) -> list[str]:
    """What each call says on this rank: `("add", arguments)` or `("load", folder)`."""
    said = []
    for what, argument in calls:
        chunks = ranks.build_chunks(layout, folder, load=False, **overrides)
        try:
            for chunk in chunks:
                add_lora(chunk, **(argument if what == "add" else settings))
            if what == "load":
                load_adapter(chunks, argument)
            said.append("accepted")
        except VLBridgeError as error:
            said.append(str(error))
    return said


def drop(layout: Layout, folder: Path, settings: Settings, count: int) -> dict[str, Any]:
    """The output of the adapters of the first layer, `count` times with dropout and once without, for equal inputs."""
    (chunk,) = ranks.build_chunks(layout, folder, load=False)
    add_lora(chunk, **settings)
    for shard in adapter_shards(chunk):
        shard.values.fill_(0.1)
    layer = chunk.language_model.decoder.layers[0]
    found = {}
    for name, adapter in (("column", layer.self_attention.linear_qkv_lora), ("row", layer.mlp.linear_fc2_lora)):
        x = torch.ones(8, 1, next(p for n, p in adapter.named_parameters() if n.endswith("A")).shape[1])
        adapter.train()
        dropped = [adapter(x).detach() for _ in range(count)]
        mask = adapter._dropped(x)
        adapter.eval()
        found[name] = {"dropped": torch.stack(dropped), "whole": adapter(x).detach(), "input": mask}
    return found


def save(layout: Layout, folder: Path, settings: Settings, target: Path) -> None:
    """A folder of peft with the adapters that a training starts with."""
    chunks = ranks.build_chunks(layout, folder, load=False)
    for chunk in chunks:
        add_lora(chunk, **settings)
    save_adapter(chunks, target, "base")
