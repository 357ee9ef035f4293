"""Functions run in the workers: training steps with frozen parts and with learning rates of parts."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlbridge.model.parts import freeze, set_lr_multipliers
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.learning_rates import lr_overrides
from megatron_vlbridge.training.step import vlm_step
from tests.functional import ranks
from tests.functional.pool import Layout

Pack = Mapping[str, torch.Tensor]
LR, MIN_LR, WEIGHT_DECAY = 1e-2, 1e-3, 0.1
# The step that is measured is one step after a warmup of two.
SCHEDULE = {
    "init_lr": 0.0,
    "lr_warmup_steps": 2,
    "lr_decay_steps": 10,
    "lr_decay_style": "cosine",
    "start_wd": WEIGHT_DECAY,
    "end_wd": WEIGHT_DECAY,
    "wd_incr_steps": 10,
    "wd_incr_style": "constant",
}
# In place of the gradient of a parameter that has none.
NO_GRADIENT = 7.0


def freeze_each(
    layout: Layout,
    folder: Path,
    packs: Sequence[Pack],
    sets: Sequence[Collection[str]],
    orders: Sequence[Sequence[int]],
    steps: int = 2,
    **options: Any,
) -> list[dict[str, Any]]:
    """For each set of frozen parts the losses and gradients of a step, and the weights after `steps` steps of Adam.

    `orders`: for each set, the order of the packs; before the step that is measured they run in the reverse order, in
    which Megatron's DDP counts the gradients of each parameter, to reduce it during later backwards.
    """
    return [
        _train(layout, folder, [packs[i] for i in order], frozen, steps, options)
        for frozen, order in zip(sets, orders, strict=True)
    ]


def _train(
    layout: Layout, folder: Path, packs: Sequence[Pack], frozen: Collection[str], steps: int, options: dict[str, Any]
) -> dict[str, Any]:
    chunks = ranks.build_chunks(layout, folder, **options)
    for chunk in chunks:
        freeze(chunk, frozen)
    wrapped = _wrap(chunks)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=LR, weight_decay=WEIGHT_DECAY), wrapped)
    _run(wrapped, packs[::-1])
    _run(wrapped, [])
    reports = _run(wrapped, packs)
    trainable = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    result = {
        "reports": [report["lm loss"] for report in reports],
        "gradients": [shard for chunk in chunks for shard in _gradient_shards(chunk)],
        "trainable": trainable,
        "gradient elements": sum(
            buffer.grad_data.numel() for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ),
    }
    for step in range(steps):
        if step:
            _run(wrapped, packs)
        optimizer.step()
    result["weights"] = [shard for chunk in chunks for shard in ranks.weight_shards(chunk)]
    states = [
        state for part in optimizer.chained_optimizers if part.optimizer for state in part.optimizer.state.values()
    ]
    result["state elements"] = sum(state[name].numel() for state in states for name in ("exp_avg", "exp_avg_sq"))
    return result


def _wrap(chunks: Sequence[Qwen3VLModel]) -> list[DistributedDataParallel]:
    """As Megatron's pretrain wraps them, with overlapped gradient reduction."""
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True)
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    syncs = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return wrapped


def _run(wrapped: list[DistributedDataParallel], packs: Sequence[Pack]) -> list[Any]:
    """Forward and backward of a step, from gradients of zero."""
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    return ranks._run(wrapped, vlm_step, ranks._mine(packs), forward_only=False) if packs else []


def _gradient_shards(model: Qwen3VLModel) -> list[ranks.Shard]:
    """As `ranks.gradient_shards`, with `NO_GRADIENT` where a parameter has none."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert not any(hasattr(p, "main_grad") or p.grad is not None for p in frozen)
    for p in frozen:
        p.main_grad = torch.full_like(p, NO_GRADIENT)
    shards = ranks.gradient_shards(model)
    for p in frozen:
        del p.main_grad
    return shards


def step_each(
    layout: Layout,
    folder: Path,
    packs: Sequence[Pack],
    optimizer: str,
    scale: float,
    runs: Sequence[Mapping[str, float]],
) -> list[dict[str, Any]]:
    """For each choice of learning-rate multipliers the gradients, and the weights after one step at `scale` * `LR`."""
    results = []
    for multipliers in runs:
        chunks = ranks.build_chunks(layout, folder)
        for chunk in chunks:
            set_lr_multipliers(chunk, multipliers)
        wrapped = _wrap(chunks)
        config = OptimizerConfig(
            optimizer=optimizer, lr=scale * LR, min_lr=scale * MIN_LR, weight_decay=WEIGHT_DECAY, clip_grad=0.0
        )
        overrides = get_standard_config_overrides(config) | lr_overrides(config, wrapped)
        made = get_megatron_optimizer(config, wrapped, config_overrides=overrides)
        OptimizerParamScheduler(made, **SCHEDULE, max_lr=config.lr, min_lr=config.min_lr).step(3)
        _run(wrapped, packs)
        gradients = [shard for chunk in chunks for shard in ranks.gradient_shards(chunk)]
        made.step()
        results.append(
            {
                "gradients": gradients,
                "weights": [shard for chunk in chunks for shard in ranks.weight_shards(chunk)],
            }
        )
    return results
