"""The whole model on one GPU: built, filled, run forward and backward by `vlm_step`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.live import load_hf_weights
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertForm
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.guards import check_layout
from megatron_vlbridge.training.step import vlm_step
from tests.functional.ranks import assemble, weight_shards


@contextmanager
def one_process(backend: str, store: Path) -> Iterator[None]:
    """Megatron's process groups of one process; `store` is a file that is not there yet."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build(folder: Path, dtype: torch.dtype, *, load: bool = True, **overrides: Any) -> Qwen3VLModel:
    """The model that `folder` describes, on the GPU, with its weights or random ones."""
    hf_config = read_config(folder)
    config = language_config(
        hf_config,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **overrides,
    )
    check_layout(config, hf_config)
    model = Qwen3VLModel(config, hf_config).cuda()
    if load:
        load_hf_weights(model, folder)
    return model


@dataclass(frozen=True)
class Result:
    """Of one pack, on the CPU in fp32: logits `[T, V]`, the mean loss, and its gradients by Hugging Face name."""

    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]


def run(model: Qwen3VLModel, pack: Mapping[str, torch.Tensor]) -> Result:
    """Forward and backward of one pack."""
    kept: list[torch.Tensor] = []
    # Cloned: the loss is computed in place. The check before the first step also runs the head, before.
    hook = model.language_model.output_layer.register_forward_hook(lambda *call: kept.append(call[2][0].clone()))
    loss = backward(model, pack)
    hook.remove()
    config = model.hf_config
    gradients = find(config).table(config, ExpertForm.FUSED_OUT_IN).to_hf(assemble([_gradient_shards(model)]))
    return Result(kept[-1][:, 0, : config.text.vocab_size].detach().float().cpu(), loss.item(), gradients)


def backward(model: Qwen3VLModel, pack: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of the pack's supervised tokens, its gradients left in `grad`."""
    output, loss_function = vlm_step(iter([{key: value[None] for key, value in pack.items()}]), model)
    total, count, _ = loss_function(output)
    loss = total / count
    loss.backward()
    return loss.detach()


def _gradient_shards(model: Qwen3VLModel) -> list[Any]:
    weights = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        assert p.grad is not None
        p.data = p.grad
    shards = [(key, offset, data.float().cpu()) for key, offset, data in weight_shards(model)]
    for name, p in model.named_parameters():
        p.data = weights[name]
    return shards
