"""This rank's chunks of a model, built and wrapped as by the `get_model` of Megatron's training loop.

For Megatron-Core 0.19.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.errors import VLBridgeError

type Chunks = list[torch.nn.Module]
type Hook = Callable[[Chunks], Chunks | None]
"""Changes chunks in place, or gives others in their place."""


def build_chunks(
    config: TransformerConfig,
    build_stage: Callable[..., torch.nn.Module],
    *,
    hooks: Sequence[Hook] = (),
    ddp_config: DistributedDataParallelConfig | None = None,
) -> Chunks:
    """This rank's chunks, one for each virtual stage, on its accelerator where it has one.

    `build_stage(pre_process=, post_process=, vp_stage=)` makes one, as Megatron's `model_provider`. The `hooks` get all
    chunks before anything wraps them. Then they are wrapped by `Float16Module` if `config` has fp16 or bf16, and by
    `DistributedDataParallel` if there is a `ddp_config`. `parallel_state` is initialized. All ranks must call it.

    Raises VLBridgeError: the parallel sizes of `config` are not those of the process groups, or a hook gives something
    else than modules. Example: `build_chunks(config, partial(Qwen3VLModel, config, hf_config), ddp_config=ddp_config)`.
    """
    check_parallel_sizes(config)
    chunks = [build_stage(**stage) for stage in _stages(config)]
    for hook in hooks:
        chunks = apply_hook(hook, chunks)
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        # Optimizers and checkpoints expect the attributes on all parameters, adapters included.
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if torch.cuda.is_available():
        chunks = [chunk.cuda(torch.cuda.current_device()) for chunk in chunks]
    if config.fp16 or config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    if ddp_config is None:
        return chunks
    # Buckets overlap communication with the backward of the first chunk alone.
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def check_parallel_sizes(config: TransformerConfig) -> None:
    """Reject a config whose parallel sizes are not those that `parallel_state` was initialized with."""
    if not parallel_state.is_initialized():
        raise VLBridgeError(
            "the chunks of the model: expected Megatron's process groups, found none. Call "
            "megatron.core.parallel_state.initialize_model_parallel first."
        )
    sizes = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }
    if config.num_moe_experts:
        sizes["expert_tensor_parallel_size"] = parallel_state.get_expert_tensor_parallel_world_size()
    different = [
        f"{name}={getattr(config, name)}, of the process groups {size}"
        for name, size in sizes.items()
        if getattr(config, name) != size
    ]
    if different:
        raise VLBridgeError(
            f"the config of the model does not match Megatron's process groups: {'; '.join(different)}. Give both the "
            "same sizes."
        )


def _stages(config: TransformerConfig) -> list[dict[str, Any]]:
    pipeline = ProcessGroupCollection.use_mpu_process_groups(["pp"]).pp
    first, last = is_pp_first_stage(pipeline), is_pp_last_stage(pipeline)
    size = config.virtual_pipeline_model_parallel_size
    if size is None or pipeline.size() == 1:
        return [{"pre_process": first, "post_process": last, "vp_stage": None}]
    return [
        {
            "pre_process": first and is_vp_first_stage(stage, size),
            "post_process": last and is_vp_last_stage(stage, size),
            "vp_stage": stage,
        }
        for stage in range(size)
    ]


def apply_hook(hook: Hook, chunks: Chunks) -> Chunks:
    """The chunks that a hook gives, or those that it was called with and may have changed."""
    given = hook(chunks)
    if given is None:
        return chunks
    if not (isinstance(given, list) and given and all(isinstance(chunk, torch.nn.Module) for chunk in given)):
        raise VLBridgeError(
            f"hook {getattr(hook, '__name__', hook)}: expected a list of modules, or None for the chunks that it was "
            f"called with, found {type(given).__name__}."
        )
    return given
