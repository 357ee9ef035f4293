"""What runs inside the workers: a model of a layout, its forward and backward through Megatron's schedules."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.live import load_hf_weights
from megatron_vlbridge.model.inputs import PackedInputs
from megatron_vlbridge.model.lora.attach import add_lora
from megatron_vlbridge.model.lora.entries import adapter_shards
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.batch import read_pack
from megatron_vlbridge.training.guards import check_layout
from megatron_vlbridge.training.step import token_loss, vlm_step
from tests.closeness import FP32, relative_error
from tests.functional.pool import Layout

Shard = tuple[str, tuple[int, ...], torch.Tensor]


def build_model(layout: Layout, folder: Path, **options: Any) -> Qwen3VLModel:
    """This rank's stage, where it holds one chunk of the model; see `build_chunks`."""
    (model,) = build_chunks(layout, folder, **options)
    return model


def build_chunks(
    layout: Layout,
    folder: Path,
    vocab_size: int | None = None,
    load: bool = True,
    balance_vision: bool = True,
    seq_length: int | None = None,
    lora: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> list[Qwen3VLModel]:
    """This rank's chunks of the model (one for each virtual stage), with the folder's weights or random ones.

    `lora` are the arguments of `add_lora`, and `values`: by the names of the checkpoint, those of the adapters.
    """
    hf_config = read_config(folder)
    # Deepstack features that travel over stages need it, as a user with experts is told.
    dispatcher = {} if hf_config.text.moe is None else {"moe_token_dispatcher_type": "alltoall"}
    precision = {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    config = language_config(
        hf_config,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=layout.sp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        use_cpu_initialization=True,
        # As Megatron's pretrain has it: without overlap two stages confuse what they send each other.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **({"pipeline_model_parallel_layout": layout.stages} | dispatcher | precision | overrides),
    )
    check_layout(config, hf_config)
    chunks = [
        Qwen3VLModel(
            config,
            hf_config,
            vocab_size=vocab_size,
            balance_vision=balance_vision,
            seq_length=seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            vp_stage=number if layout.vpp > 1 else None,
        )
        for number in range(layout.vpp)
    ]
    if load:
        load_hf_weights(chunks, folder)
    if lora is not None:
        add_adapters(chunks, **lora)
    return chunks


def add_adapters(chunks: Sequence[Qwen3VLModel], values: Mapping[str, torch.Tensor], **settings: Any) -> None:
    """Adapters for each chunk, with these values."""
    for chunk in chunks:
        add_lora(chunk, **settings)
        for shard in adapter_shards(chunk):
            shard.values.copy_(values[shard.region.name][shard.region.slices])


def forward_backward(
    layout: Layout,
    folder: Path,
    packs: Sequence[Mapping[str, torch.Tensor]],
    towers: bool = False,
    step: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """One training step's forward and backward over `packs`, dealt out to the data-parallel ranks.

    Gives, of each of this rank's packs, the logits `[T, V / tp]` and token losses `[T]` (last stage), with `towers` the
    tower's output (first stage), and this rank's shards of every parameter's final gradient. `packs` may be padded
    batches; of these it gives the same, without their padding. `step` is the forward step of any other form.
    """
    chunks = build_chunks(layout, folder, **options)
    step = Recorder(chunks[-1], step or (padded_step if "input_ids" in packs[0] else vlm_step))
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    reports = _run(wrapped, step, _mine(packs), forward_only=False)
    return {
        "vision": _towers(chunks[0], _mine(packs)) if towers and chunks[0].pre_process else [],
        "logits": step.logits,
        "losses": step.losses,
        "reports": [report["lm loss"] for report in reports],
        "gradients": [shard for chunk in chunks for shard in gradient_shards(chunk)],
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "cp_rank": parallel_state.get_context_parallel_rank(),
        "dp_rank": parallel_state.get_data_parallel_rank(),
    }


def run_variants(
    layout: Layout, runs: Sequence[tuple[Path, Sequence[Mapping[str, torch.Tensor]], Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """`forward_backward` of each of these folders, packs and options; of the first two with the start guard."""
    results = []
    for number, (folder, packs, options) in enumerate(runs):
        with unguarded() if number > 1 else nullcontext():
            results.append(forward_backward(layout, folder, packs, **options))
    return results


class Unguarded:
    """In place of a guard, none."""

    def begin(self, model: torch.nn.Module) -> None: ...

    def forward(self, model: torch.nn.Module, inputs: PackedInputs) -> torch.Tensor:
        output: torch.Tensor = model(inputs=inputs)
        return output


@contextmanager
def unguarded() -> Iterator[None]:
    """No guard for models that are built in this block."""
    Qwen3VLModel.media_guard = Unguarded()
    try:
        yield
    finally:
        Qwen3VLModel.media_guard = None


class Recorder:
    """A training step that keeps the logits and token losses of `last`, the chunk that may hold the head."""

    def __init__(self, last: Qwen3VLModel, step: Any) -> None:
        self.logits: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []
        self.step = step
        if last.post_process:
            last.language_model.output_layer.register_forward_hook(self._keep_logits)

    def __call__(self, iterator: Any, model: torch.nn.Module) -> Any:
        """`vlm_step`, or the same for a padded batch."""
        before = len(self.logits)
        output, loss = self.step(iterator, model)
        if get_attr_wrapped_model(model, "post_process"):
            # Multi-token prediction runs the head for its own layers first.
            self.logits[before:] = self.logits[-1:]
            self.losses.append(output.detach().clone().flatten())
        return output, loss

    def _keep_logits(self, module: torch.nn.Module, arguments: Any, output: tuple[torch.Tensor, Any]) -> None:
        # The loss works in place.
        self.logits.append(output[0][:, 0].detach().clone())


def padded_step(iterator: Any, model: torch.nn.Module) -> Any:
    """The forward step of a padded batch: the losses of its tokens, those of padding left out."""
    batch = {key: value[0] for key, value in next(iterator).items()}
    output = model(**batch)
    kept = batch["attention_mask"].bool()
    mask = (batch["labels"] != -100).float()[kept][None]
    return output[kept][None] if get_attr_wrapped_model(model, "post_process") else output, partial(token_loss, mask)


def load_run_save(
    layout: Layout,
    folder: Path,
    checkpoint: Path,
    packs: Sequence[Mapping[str, torch.Tensor]],
    saved: Path,
    vocab_size: int,
) -> dict[str, Any]:
    """Load `checkpoint` with Megatron's own loader into a random model, run it, save it with Megatron's own saver."""
    chunks = build_chunks(layout, folder, vocab_size=vocab_size, load=False)
    state = dist_checkpointing.load(_sharded(chunks), str(checkpoint / "release"))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{number}"])
    step = Recorder(chunks[-1], vlm_step)
    _run(chunks, step, _mine(packs), forward_only=True)
    if torch.distributed.get_rank() == 0:
        saved.mkdir()
    torch.distributed.barrier()
    get_write_results_queue(mp_mode="fork")  # otherwise the save starts an interpreter, which takes seconds
    dist_checkpointing.save(_sharded(chunks), str(saved))
    return {
        "logits": step.logits,
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "cp_rank": parallel_state.get_context_parallel_rank(),
        "dp_rank": parallel_state.get_data_parallel_rank(),
    }


def _sharded(chunks: Sequence[Qwen3VLModel]) -> dict[str, Any]:
    """As Megatron's own saver names the chunks of a rank."""
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}


def gradient_shards(model: Qwen3VLModel) -> list[Shard]:
    """This rank's shards of the gradients, by canonical checkpoint key and offset."""
    weights = {p: p.data for p in model.parameters() if hasattr(p, "main_grad")}
    for p in weights:
        p.data = p.main_grad
    shards = weight_shards(model)
    for p, values in weights.items():
        p.data = values
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
        assert relative_error(data, known) < FP32, f"{key} at {offset}: copies differ between ranks"
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
    inputs = [read_pack(pack, model.hf_config) for pack in packs]
    with torch.no_grad():
        return [
            model.vision_model(x.patches, x.frames)
            if x.frames.grids
            else torch.zeros(len(model.hf_config.vision.deepstack_visual_indexes) + 1, 0, model.config.hidden_size)
            for x in inputs
        ]


def _run(model: Any, step: Any, packs: Sequence[Mapping[str, torch.Tensor]], **kwargs: Any) -> list[Any]:
    chunks = model if isinstance(model, list) else [model]
    # Megatron's loaders give an iterator, one for each chunk, to the first tensor-parallel rank only.
    padded = "input_ids" in packs[0]
    tokens = packs[0]["input_ids" if padded else "tokens"]
    # Rows that are cut among the context-parallel ranks stand one below the other.
    length = tokens.numel() if "cu_seqlens" in packs[0] else tokens.shape[-1]
    reads = padded or parallel_state.get_tensor_model_parallel_rank() == 0
    iterators = [iter(packs) if reads else None for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(packs),
        seq_length=length,
        micro_batch_size=1,
        **kwargs,
    )


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
                assert all(relative_error(part, parts[0]) < FP32 for part in parts), f"{key} differ"
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
