"""What runs inside the workers: deliberate sabotages of a stage or of what it reads, and the error of each rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_vlbridge.backends.select import spec_provider
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.inputs import PackedInputs
from megatron_vlbridge.model.transformer_config import vision_config
from megatron_vlbridge.model.vision.tower import VisionModel
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.step import vlm_step
from tests.functional import ranks
from tests.functional.pool import Layout

Pack = Mapping[str, torch.Tensor]
Model = torch.nn.Module


class Wrapper(MegatronModule):
    """A user's module around a stage, which changes the keywords that it passes on."""

    def __init__(self, stage: Qwen3VLModel, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__(stage.config)
        self.module, self.change = stage, change

    def forward(self, **keywords: Any) -> Any:
        return self.module(**self.change(keywords))


def with_inputs(change: Callable[[PackedInputs], PackedInputs]) -> Callable[[Qwen3VLModel], Model]:
    return lambda stage: Wrapper(stage, lambda keywords: {"inputs": change(keywords["inputs"])})


def first(sabotage: Callable[[Qwen3VLModel], Model | None]) -> Callable[[Qwen3VLModel], Model]:
    """Of the first stage only."""
    return lambda stage: (sabotage(stage) if stage.pre_process else None) or stage


def last(sabotage: Callable[[Qwen3VLModel], Model | None]) -> Callable[[Qwen3VLModel], Model]:
    """Of the last stage only."""
    return lambda stage: (sabotage(stage) if stage.post_process else None) or stage


def _other_tower(stage: Qwen3VLModel) -> None:
    if not stage.pre_process:
        config = vision_config(stage.hf_config, stage.config)
        stage.visual = VisionModel(config, stage.hf_config, spec_provider(), stage.pg_collection)


def _hook_tower(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Qwen3VLModel], None]:
    def install(stage: Qwen3VLModel) -> None:
        stage.vision_model.register_forward_hook(lambda module, args, output: change(output))

    return install


def _hook_output(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Qwen3VLModel], None]:
    def install(stage: Qwen3VLModel) -> None:
        stage.register_forward_hook(lambda module, args, output: change(output))

    return install


def _without_images(stage: Qwen3VLModel) -> None:
    """A forward replaced on the instance, which embeds the tokens and forgets the tower."""

    def embed(inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor]:
        text = stage.language_model.embedding(input_ids=inputs.tokens, position_ids=None)
        levels, count = stage._remaining_levels, len(inputs.vision_token_index)
        shape = (levels, count if inputs.shard is None else len(inputs.shard.embed_index))
        return stage.language_model.scatter(text), text.new_zeros(*shape, *text.shape[1:])

    stage._embed = embed


def _unused_parameter(stage: Qwen3VLModel) -> None:
    stage.extra_head = torch.nn.Linear(2, 2)


def _buffered(stage: Qwen3VLModel) -> None:
    """A parameter whose gradient goes to Megatron's buffer without autograd, as some fused kernels do it."""
    stage.fused = torch.nn.Parameter(torch.ones(1))

    def add(output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: stage.fused.main_grad.add_(1) and None)

    stage.register_forward_hook(lambda module, args, output: add(output))


def _detach_hidden(stage: Qwen3VLModel) -> None:
    """A decoder that does not pass gradients to the previous stage."""
    decoder = stage.language_model.decoder
    given = decoder.set_input_tensor
    decoder.set_input_tensor = lambda tensor: given(tensor.detach().requires_grad_())
    forget = stage.receive
    stage.receive = lambda inputs: forget(inputs).detach()


def _same_for_all(inputs: PackedInputs) -> PackedInputs:
    """Positions that count the tokens from zero, as of text."""
    count = torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device)
    return replace(inputs, position_ids=count.expand_as(inputs.position_ids))


def _swapped(inputs: PackedInputs) -> PackedInputs:
    """The pixels of the last frame for the first one, and so on."""
    return replace(inputs, patches=inputs.patches.flip(0))


def _swapped_videos(inputs: PackedInputs) -> PackedInputs:
    """As `_swapped`, in the last four of six frames."""
    images, videos = inputs.patches.tensor_split([len(inputs.patches) // 3])
    return replace(inputs, patches=torch.cat((images, videos.flip(0))))


def _no_videos(inputs: PackedInputs) -> PackedInputs:
    patches = inputs.patches.clone()
    patches[-len(patches) // 2 :] = 0
    return replace(inputs, patches=patches)


def _blank(inputs: PackedInputs) -> PackedInputs:
    return replace(inputs, patches=torch.zeros_like(inputs.patches))


def _noncausal(output: torch.Tensor) -> torch.Tensor:
    return output + output.mean(0, keepdim=True)


SABOTAGES: dict[str, Callable[[Qwen3VLModel], Model]] = {
    "none": lambda stage: stage,
    "fused gradient": last(_buffered),
    "forward without images": first(_without_images),
    "blank pixels": first(with_inputs(_blank)),
    "no videos": first(with_inputs(_no_videos)),
    "swapped pixels": first(with_inputs(_swapped)),
    "swapped videos": first(with_inputs(_swapped_videos)),
    "features of one token": first(_hook_tower(lambda x: torch.cat((x[:, :1], 0 * x[:, 1:]), dim=1))),
    "non-causal": first(_hook_output(_noncausal)),
    "dropped keywords": first(lambda stage: Wrapper(stage, lambda keywords: {})),
    "dropped keywords later": last(lambda stage: Wrapper(stage, lambda keywords: {})),
    "text positions": last(with_inputs(_same_for_all)),
    "tower on a later stage": lambda stage: _other_tower(stage) or stage,
    "detached tower": first(_hook_tower(lambda x: x.detach())),
    "unused parameter": last(_unused_parameter),
    "detached hidden states": last(_detach_hidden),
}


def _wrap(chunks: Sequence[Qwen3VLModel], sabotage: str) -> list[DistributedDataParallel]:
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(chunk.config, ddp, SABOTAGES[sabotage](chunk)) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    return wrapped


def train(
    layout: Layout, folder: Path, packs: Sequence[Pack], sabotages: Sequence[str], **options: Any
) -> list[str | None]:
    """Of each sabotage the error of this rank in an iteration, None where it has none."""
    found: list[str | None] = []
    for sabotage in sabotages:
        wrapped = _wrap(ranks.build_chunks(layout, folder, **options), sabotage)
        found.append(_error(wrapped, ranks._mine(packs)))
    return found


def _error(wrapped: list[Any], packs: Sequence[Pack], **options: Any) -> str | None:
    try:
        ranks._run(wrapped, vlm_step, packs, **{"forward_only": False} | options)
    except VLBridgeError as error:
        return str(error)
    return None


def train_on(
    layout: Layout, folder: Path, runs: Sequence[Sequence[Sequence[Pack]]], coordinate: str, **options: Any
) -> list[list[str | None]]:
    """Of each run the error of this rank after each iteration; the packs are those of the rank's `coordinate`."""
    rank = {"pp": parallel_state.get_pipeline_model_parallel_rank, "cp": parallel_state.get_context_parallel_rank}
    found = []
    for run in runs:
        wrapped = _wrap(ranks.build_chunks(layout, folder, **options), "none")
        packs = [{key: value[None] for key, value in pack.items()} for pack in run[rank[coordinate]()]]
        half = len(packs) // 2
        found.append([_error(wrapped, part) for part in (packs[:half], packs[half:])])
    return found


def evaluate(layout: Layout, folder: Path, packs: Sequence[Pack], sabotages: Sequence[str]) -> list[list[str | None]]:
    """Of each sabotage the errors of this rank in two evaluations, and in an iteration after them."""
    found = []
    for sabotage in sabotages:
        wrapped = _wrap([ranks.build_model(layout, folder)], sabotage)
        with torch.no_grad():
            errors = [_error(wrapped, ranks._mine(packs), forward_only=True) for _ in range(2)]
        found.append([*errors, _error(wrapped, ranks._mine(packs))])
    return found


def first_step(layout: Layout, folder: Path, packs: Sequence[Pack], **options: Any) -> list[dict[str, Any]]:
    """Losses, gradients, buffers and random numbers of a first step, without the guard and with it.

    The forward counts its calls and draws a random number.
    """
    found = []
    for guarded in (False, True):
        torch.manual_seed(5)
        chunks = ranks.build_chunks(layout, folder, **options)
        for chunk in chunks:
            chunk.register_buffer("calls", torch.zeros(1), persistent=False)
            # As modules of Transformer Engine have it.
            chunk.is_first_microbatch, chunk.seen = True, []
            chunk.register_forward_hook(_count_and_draw)
            if not guarded:
                chunk.media_guard = ranks.Unguarded()
        wrapped = _wrap(chunks, "none")
        modes = [part.training for chunk in chunks for part in chunk.modules()]
        reports = ranks._run(wrapped, vlm_step, ranks._mine(packs), forward_only=False)
        assert not any(p._backward_hooks for chunk in chunks for p in chunk.parameters())
        assert modes == [part.training for chunk in chunks for part in chunk.modules()]
        found.append(
            {
                "reports": [report["lm loss"] for report in reports],
                "gradients": [p.main_grad.clone() for chunk in chunks for p in chunk.parameters()],
                "buffers": [buffer.clone() for chunk in chunks for buffer in chunk.buffers()],
                "random": torch.get_rng_state(),
                "first micro-batch": [seen for chunk in chunks for seen in chunk.seen],
            }
        )
    return found


def _count_and_draw(stage: Model, args: Any, output: Any) -> None:
    stage.calls += 1
    torch.rand(1)
    if stage.training:
        stage.seen.append(torch.tensor(stage.is_first_microbatch))
    stage.is_first_microbatch = False
