"""The forward step for Megatron's `pretrain`, and its loss: a sum and a token count, by which Megatron divides it."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from megatron_vlbridge.training.batch import next_inputs
from megatron_vlbridge.training.guards import check_model
from megatron_vlbridge.training.media_guard.guard import guard_of, stage_of
from megatron_vlbridge.training.metrics.meter import LossFunction, Meter

# Avoids 0 / 0 in the log of a global batch without supervised tokens; negligible beside any count.
_NO_COUNT = 1e-30


def vlm_step(
    data_iterator: Iterator[Mapping[str, Any]] | None, model: torch.nn.Module, meter: Meter | None = None
) -> tuple[torch.Tensor, LossFunction]:
    """Megatron's `forward_step_func` for a :class:`Qwen3VLModel`, bare or wrapped (DDP, Float16Module).

    On every pipeline stage and context-parallel rank, the first tensor-parallel rank reads the same pack (see
    `training.batch.PACK_KEYS`) from its `data_iterator` and broadcasts it to the others, which may have None. Returns
    the output of the stage and the loss function, which Megatron calls on the last stage. `meter`, if any, counts the
    packs of training (not of evaluation) and checks that their losses are finite.

    Raises VLBridgeError: at the first call, if the parallel layout or a setting is not verified; before the first
    optimizer step, if `model` would train without its images or with wrong positions; at any call, if the pack is
    invalid.
    Example: `pretrain(config, dataset_provider, ModelType.encoder_or_decoder, vlm_step, model_provider)`.
    """
    stage = stage_of(model)
    check_model(stage)
    # Checks before the first optimizer step that images reach their tokens, see `media_guard`.
    guard = guard_of(stage)
    guard.begin(model)
    observer = meter if stage.training else None
    # Of the ranks that read a pack only one counts it.
    is_counting_rank = stage.pre_process and stage.pg_collection.cp.rank() == 0
    inputs = next_inputs(
        data_iterator,
        stage.hf_config,
        stage.pg_collection,
        pre_process=stage.pre_process,
        post_process=stage.post_process,
        sequence_parallel=stage.config.sequence_parallel,
        check_position_ids=stage.check_position_ids,
        note_pack=observer.note_pack if observer and is_counting_rank else None,
    )
    assert inputs.loss_mask is not None
    loss = partial(token_loss, inputs.loss_mask, loss_weights=inputs.loss_weights)
    return guard.forward(model, inputs), partial(observer.watch, inputs, loss) if observer else loss


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor, loss_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the losses of the supervised tokens, their count, and both for the log.

    Takes `loss_mask` `[1, T]` (1 or 0), the per-token `losses` `[1, T]`, and optional weights of them, `loss_weights`
    `[1, T]`. Megatron divides by the number of supervised tokens in the global batch (`--calculate-per-token-loss`):
    weights scale the sum alone. The log's count is never 0, so that the loss in the log of a global batch without
    supervised tokens is 0.

    Example: `token_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 9.0]]))[0]` is `tensor(2.)`.
    """
    weighted = losses.float() if loss_weights is None else losses.float() * loss_weights
    total = (weighted * loss_mask).sum()
    count = loss_mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack((total.detach(), count.to(total.dtype).clamp(min=_NO_COUNT)))}
