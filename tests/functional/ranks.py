"""What runs inside the workers: a model of a layout, its forward and backward through Megatron's schedules."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlbridge.checkpoint.live import load_hf_weights
from megatron_vlbridge.config import read_config
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.batch import next_inputs, read_pack
from megatron_vlbridge.training.guards import check_layout
from megatron_vlbridge.training.step import vlm_step
from tests.functional.pool import Layout

Shard = tuple[str, tuple[int, ...], torch.Tensor]


def build_model(
    layout: Layout,
    folder: Path,
    vocab_size: int | None = None,
    load: bool = True,
    balance_vision: bool = True,
    **overrides: Any,
) -> Qwen3VLModel:
    """This rank's stage, with the folder's weights or random ones."""
    checkpoint = read_config(folder)
    config = language_config(
        checkpoint,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **overrides,
    )
    check_layout(config, checkpoint)
    model = Qwen3VLModel(
        config,
        checkpoint,
        vocab_size=vocab_size,
        balance_vision=balance_vision,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if load:
        load_hf_weights(model, folder)
    return model


def forward_backward(
    layout: Layout, folder: Path, packs: Sequence[Mapping[str, torch.Tensor]], **overrides: Any
) -> dict[str, Any]:
    """One training step's forward and backward over `packs`, dealt out to the data-parallel ranks.

    Gives, of each of this rank's packs, the tower's output (first stage), the logits `[T, V / tp]` and token losses
    `[T]` (last stage), and this rank's shards of every parameter's final gradient.
    """
    model = build_model(layout, folder, **overrides)
    logits = _run(model, _logits_step, _mine(packs), forward_only=True, collect_non_loss_data=True)
    losses = _run(model, _losses_step, _mine(packs), forward_only=True, collect_non_loss_data=True)
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False), model
    )
    model.config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    reports = _run(wrapped, vlm_step, _mine(packs), forward_only=False)
    return {
        "vision": _towers(model, _mine(packs)) if model.pre_process else [],
        "logits": [x[0].clone() for x in logits],
        "losses": [x[0].clone() for x in losses],
        "reports": [report["lm loss"] for report in reports],
        "gradients": gradient_shards(model),
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "cp_rank": parallel_state.get_context_parallel_rank(),
        "dp_rank": parallel_state.get_data_parallel_rank(),
    }


def load_run_save(
    layout: Layout,
    folder: Path,
    checkpoint: Path,
    packs: Sequence[Mapping[str, torch.Tensor]],
    saved: Path,
    vocab_size: int,
) -> dict[str, Any]:
    """Load `checkpoint` with Megatron's own loader into a random model, run it, save it with Megatron's own saver."""
    model = build_model(layout, folder, vocab_size=vocab_size, load=False)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint / "release"))
    model.load_state_dict(state["model"])
    logits = _run(model, _logits_step, _mine(packs), forward_only=True, collect_non_loss_data=True)
    if torch.distributed.get_rank() == 0:
        saved.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(saved))
    return {
        "logits": [x[0].clone() for x in logits],
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "cp_rank": parallel_state.get_context_parallel_rank(),
        "dp_rank": parallel_state.get_data_parallel_rank(),
    }


def gradient_shards(model: Qwen3VLModel) -> list[Shard]:
    """This rank's shards of the gradients, by canonical checkpoint key and offset."""
    weights = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.main_grad
    shards = weight_shards(model)
    for name, p in model.named_parameters():
        p.data = weights[name]
    return shards


def weight_shards(model: Qwen3VLModel) -> list[Shard]:
    """This rank's shards of the parameters, by canonical checkpoint key and offset."""
    shards = []
    for entry in model.sharded_state_dict().values():
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for shard in built.values() if isinstance(built, dict) else built if isinstance(built, list) else [built]:
            if isinstance(shard, ShardedTensor):
                data = shard.data.detach().clone()
                shards.append((shard.key, shard.global_offset, data[(None,) * shard.prepend_axis_num]))
    return shards


def assemble(shards: Sequence[Sequence[Shard]]) -> dict[str, torch.Tensor]:
    """The full tensors from all ranks' shards; copies of one place must be equal, and every place must be there."""
    full: dict[str, torch.Tensor] = {}
    pieces: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for key, offset, data in (shard for rank in shards for shard in rank):
        known = pieces.setdefault(key, {}).setdefault(offset, data)
        assert torch.allclose(known, data, rtol=1e-5, atol=1e-9), f"{key} at {offset}: copies differ between ranks"
    for key, parts in pieces.items():
        shape = tuple(
            max(o + s for o, s in ends)
            for ends in zip(*(tuple(zip(o, d.shape, strict=True)) for o, d in parts.items()), strict=True)
        )
        tensor = torch.full(shape, float("nan"))
        for offset, data in parts.items():
            tensor[tuple(slice(o, o + s) for o, s in zip(offset, data.shape, strict=True))] = data
        assert not tensor.isnan().any(), f"{key}: some part is on no rank"
        full[key] = tensor
    return full


def _mine(packs: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's packs, with the axis that a data loader adds."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [{key: value[None] for key, value in pack.items()} for pack in packs[rank::size]]


def _towers(model: Qwen3VLModel, packs: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The tower's tokens and deepstack features `[levels, N, H]` of each pack."""
    inputs = [read_pack(pack, model.checkpoint) for pack in packs]
    with torch.no_grad():
        return [
            model.vision_model(x.patches, x.frames)
            if x.frames.grids
            else torch.zeros(len(model.checkpoint.vision.deepstack_visual_indexes) + 1, 0, model.config.hidden_size)
            for x in inputs
        ]


def _run(model: Any, step: Any, packs: Sequence[Mapping[str, torch.Tensor]], **kwargs: Any) -> list[Any]:
    # Megatron's loaders give an iterator to the first tensor-parallel rank only.
    iterator = iter(packs) if parallel_state.get_tensor_model_parallel_rank() == 0 else None
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterator,
        model=[model],
        num_microbatches=len(packs),
        seq_length=packs[0]["tokens"].shape[1],
        micro_batch_size=1,
        **kwargs,
    )


def _logits_step(iterator: Any, model: Qwen3VLModel) -> Any:
    from dataclasses import replace

    inputs = next_inputs(
        iterator,
        model.checkpoint,
        model.pg_collection,
        pre_process=model.pre_process,
        post_process=model.post_process,
    )
    return model(inputs=replace(inputs, labels=None)), _collect


def _losses_step(iterator: Any, model: Qwen3VLModel) -> Any:
    output, _ = vlm_step(iterator, model)
    return output, _collect


def _collect(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    return output.detach()


def of_packs(
    results: Sequence[dict[str, Any]], key: str, layout: Layout, lengths: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """What the ranks gave under `key` for each pack of segments of these `lengths`, joined over the ranks.

    Logits are joined over the tensor-parallel ranks by their last dim; what each of those ranks has whole must be the
    same. Logits and losses are joined over the context-parallel ranks by their tokens. Ranks that gave nothing (other
    pipeline stages) are passed over.
    """
    packs = []
    for number, segments in enumerate(lengths):
        mine = [r for r in results if r[key] and r["dp_rank"] == number % layout.dp]
        by_cp = []
        for cp_rank in range(layout.cp):
            ranks = sorted((r for r in mine if r["cp_rank"] == cp_rank), key=lambda r: r["tp_rank"])
            parts = [r[key][number // layout.dp] for r in ranks]
            if key != "logits":
                assert all(torch.allclose(part, parts[0], rtol=1e-5, atol=1e-7) for part in parts), f"{key} differ"
            by_cp.append(torch.cat(parts, dim=-1) if key == "logits" else parts[0])
        packs.append(by_cp[0] if key == "vision" or layout.cp == 1 else join_zigzag(by_cp, segments))
    return packs


def join_zigzag(parts: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """The tokens of all segments without padding, from what each context-parallel rank holds, chunk by chunk."""
    size, rows, starts = len(parts), [], [0] * len(parts)
    for length in lengths:
        chunk = -(-length // (2 * size))
        chunks: dict[int, torch.Tensor] = {}
        for rank, part in enumerate(parts):
            for number in (rank, 2 * size - 1 - rank):
                chunks[number] = part[starts[rank] : starts[rank] + chunk]
                starts[rank] += chunk
        rows.append(torch.cat([chunks[number] for number in range(2 * size)])[:length])
    return torch.cat(rows)
