"""What runs inside the workers for the tests of multi-token prediction."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model import mtp
from megatron_vlbridge.training.step import vlm_step
from tests.functional import ranks
from tests.functional.pool import Layout


def predictions(
    layout: Layout, folder: Path, packs: Sequence[Mapping[str, torch.Tensor]], **options: Any
) -> dict[str, Any]:
    """Of each of this rank's packs the MTP layer's logits `[T, V / tp]` (last stage); what goes to the log."""
    chunks = ranks.build_chunks(layout, folder, **options)
    found: list[torch.Tensor] = []
    for chunk in chunks:
        if chunk.post_process:
            # The head runs for the MTP layer first; the loss then overwrites its output.
            head = chunk.language_model.output_layer
            head.register_forward_hook(lambda *call: found.extend(_logits(*call)))
    tracker = MTPLossLoggingHelper.tracker
    tracker.clear()
    ranks._run(chunks, vlm_step, ranks._mine(packs), forward_only=True)
    MTPLossLoggingHelper.reduce_metrics_in_tracker()
    logged = {key: tracker[key].item() for key in ("loss_values", "correct_values", "total_values") if key in tracker}
    return {
        "logits": found[::2],
        "logged": logged,
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "cp_rank": parallel_state.get_context_parallel_rank(),
        "dp_rank": parallel_state.get_data_parallel_rank(),
    }


def _logits(head: torch.nn.Module, _: Any, output: tuple[torch.Tensor, Any]) -> list[torch.Tensor]:
    """In training; the check before the first step runs a stage in evaluation mode."""
    return [output[0][:, 0].detach().clone()] if head.training else []


def layer_runs(layout: Layout, folder: Path, pack: Mapping[str, torch.Tensor], **options: Any) -> int:
    """How often the MTP layer runs in a forward and backward pass of one pack."""
    (chunk,) = ranks.build_chunks(layout, folder, **options)
    runs: list[bool] = []
    chunk.language_model.mtp.layers[0].mtp_model_layer.register_forward_hook(
        lambda layer, *_: runs.append(layer.training)
    )
    ranks._run([chunk], vlm_step, ranks._mine([pack]), forward_only=False)
    return sum(runs)


def largest(layout: Layout, logits: torch.Tensor) -> torch.Tensor:
    """What this rank finds, which has its part of the logits `[T, 1, V]`."""
    group = parallel_state.get_tensor_model_parallel_group()
    return mtp._largest(logits.chunk(group.size(), dim=-1)[group.rank()], group)


def build_error(layout: Layout, checkpoint: Path) -> str:
    """What building the model says where Megatron made its default embedding group."""
    try:
        ranks.build_chunks(layout, checkpoint)
    except VLBridgeError as error:
        return str(error)
    return "accepted"
