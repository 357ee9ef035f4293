"""What runs in the processes: a model of the process's backend, what its checkpoint would hold, and its numbers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.functional.pool import Layout

# Kind of entry, global shape, offset of this rank's part, its shape, and its dtype (of tensors).
Entry = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], str]


def build(layout: Layout, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """This rank's model, with random weights, on the CPU."""
    from megatron_vlbridge import read_config
    from megatron_vlbridge.model.transformer_config import language_config
    from megatron_vlbridge.model.vlm import Qwen3VLModel

    hf_config = read_config(folder)
    config = language_config(
        hf_config,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        use_cpu_initialization=True,
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
    )
    return Qwen3VLModel(config, hf_config)


def each(layout: Layout, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """`function(layout, *args)` of each of these calls."""
    return [function(layout, *args) for function, args in calls]


def describe(layout: Layout, folder: Path, dtype: torch.dtype) -> dict[str, list[Entry]]:
    """The entries of this rank's sharded checkpoint, by key."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    found: dict[str, list[Entry]] = {}
    for entry in _entries(build(layout, folder, dtype).sharded_state_dict()):
        if isinstance(entry, ShardedTensor):
            described = "tensor", entry.global_shape, entry.global_offset, entry.local_shape, str(entry.dtype)
        else:
            described = "object", entry.global_shape, entry.global_offset, (), ""
        found.setdefault(entry.key, []).append(described)
    return {key: sorted(entries) for key, entries in found.items()}


def classes(layout: Layout, folder: Path) -> set[str]:
    """The names of the model's classes."""
    return {type(module).__name__ for module in build(layout, folder).modules()}


def load(layout: Layout, folder: Path, saved: Path, strict: str) -> list[Any]:
    """This rank's shards after Megatron's loader, with this strictness, read `saved`."""
    from megatron.core import dist_checkpointing

    model = build(layout, folder)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(saved), strict=strict)
    model.load_state_dict(state["model"])
    return _shards(model)


def load_hf_and_save(layout: Layout, folder: Path, saved: Path) -> list[Any]:
    """This rank's shards after `load_hf_weights`; Megatron's saver writes them to `saved`."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    from megatron_vlbridge.checkpoint.live import load_hf_weights

    model = build(layout, folder)
    load_hf_weights(model, folder)
    saved.mkdir(exist_ok=True)
    torch.distributed.barrier()
    get_write_results_queue(mp_mode="fork")  # otherwise the save starts an interpreter, which takes seconds
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(saved))
    return _shards(model)


def called(layout: Layout, **arguments: Any) -> set[str]:
    """What a step's forward and backward call of the kernels that have references; questions about libraries aside."""
    from tests.functional.ranks import forward_backward
    from tests.te.extension import CALLS
    from tests.te.references import fla

    CALLS.clear()
    fla.CALLS.clear()
    forward_backward(layout, **arguments)
    return {name for name in (*CALLS, *fla.CALLS) if not name.startswith("get_")}


def _shards(model: Any) -> list[Any]:
    from tests.functional.ranks import weight_shards

    return weight_shards(model)


def _entries(value: object) -> list[Any]:
    """Sharded tensors and objects in a sharded state dict; factories are asked for theirs."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    if isinstance(value, ShardedTensor | ShardedObject):
        return [value]
    if isinstance(value, ShardedTensorFactory):
        return _entries(value.build())
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [entry for child in children for entry in _entries(child)]
