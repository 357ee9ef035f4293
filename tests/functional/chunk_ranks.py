"""What runs inside the workers: the chunks of a model as frameworks get them."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.integrations.chunks import Hook, build_chunks
from megatron_vlbridge.model.lora.attach import add_lora
from megatron_vlbridge.model.vlm import Qwen3VLModel
from tests.functional import ranks
from tests.functional.pool import Layout

PARALLEL_ATTRIBUTES = {"tensor_model_parallel", "partition_dim", "partition_stride"}


def wrapped(layout: Layout, folder: Path, fp16: bool = False, bf16: bool = False) -> dict[str, Any]:
    """Chunks with adapters, wrapped twice, and the parameters of those that the tests build."""
    expected = ranks.build_chunks(layout, folder, load=False, fp16=fp16, bf16=bf16)
    config, hf_config = expected[0].config, expected[0].hf_config
    seen: list[list[str]] = []

    def adapt(chunks: list[Any]) -> None:
        seen.append([type(chunk).__name__ for chunk in chunks])
        for chunk in chunks:
            add_lora(chunk, rank=2, alpha=2, targets=["q_proj"])

    def copy(chunks: list[Any]) -> list[Any]:
        seen.append([str(chunk.lora.rank) for chunk in chunks])
        return list(chunks)

    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True)
    chunks: list[Any] = build_chunks(
        config, partial(Qwen3VLModel, config, hf_config), hooks=[adapt, copy], ddp_config=ddp
    )
    inner = [chunk.module.module if fp16 or bf16 else chunk.module for chunk in chunks]
    return {
        "hooks": seen,
        "ddp": [type(chunk) is DistributedDataParallel for chunk in chunks],
        "halved": [type(chunk.module) is Float16Module for chunk in chunks],
        "dtypes": {p.dtype for chunk in chunks for p in chunk.parameters()},
        "unbucketed": [chunk.bucket_size is None for chunk in chunks],
        "missing": [n for chunk in inner for n, p in chunk.named_parameters() if PARALLEL_ATTRIBUTES - vars(p).keys()],
        "stages": [(chunk.pre_process, chunk.post_process, chunk.vp_stage) for chunk in inner],
        "expected stages": [(chunk.pre_process, chunk.post_process, chunk.vp_stage) for chunk in expected],
        "names": [[n for n, _ in chunk.named_parameters() if "_lora." not in n] for chunk in inner],
        "expected names": [[n for n, _ in chunk.named_parameters()] for chunk in expected],
        "trained": {
            n.rpartition("_lora.")[1] for chunk in inner for n, p in chunk.named_parameters() if p.requires_grad
        },
    }


def refusals(layout: Layout, folder: Path) -> list[str]:
    """What is said about a config of other sizes, and about a hook that gives no modules."""
    config, said = ranks.build_chunks(layout, folder, load=False)[0].config, []

    def no_modules(chunks: list[torch.nn.Module]) -> Any:
        return dict(enumerate(chunks))

    cases: list[tuple[dict[str, int], list[Hook]]] = [({"tensor_model_parallel_size": 4}, []), ({}, [no_modules])]
    for changes, hooks in cases:
        for name, value in changes.items():
            setattr(config, name, value)
        try:
            build_chunks(config, lambda **stage: torch.nn.Identity(), hooks=hooks)
        except VLBridgeError as error:
            said.append(str(error))
        config.tensor_model_parallel_size = layout.tp
    return said
