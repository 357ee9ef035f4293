"""What runs inside the workers of `test_copies.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.step import vlm_step
from tests.functional import ranks
from tests.functional.pool import Layout


def train(layout: Layout, folder: Path, packs: Sequence[Mapping[str, torch.Tensor]], steps: int) -> dict[str, Any]:
    """`steps` of Megatron's optimizer from random weights, with what becomes of this rank's copy of the embedding.

    `weights`: the copy before the first step and after each; `parts` and `gradients`: its gradient in each step before
    and after it was finalised, `tokens`: by how many tokens this divides it. All are empty where there is no copy.
    """
    # Each stage draws other numbers, so that copies are equal only if one is handed to the others.
    torch.manual_seed(parallel_state.get_pipeline_model_parallel_rank())
    chunks = ranks.build_chunks(layout, folder, load=False)
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.01), wrapped)
    copies = copies_of_embedding(chunks)
    parts, gradients, tokens = [], [], []

    def finalize(model: Any, num_tokens: torch.Tensor, **kwargs: Any) -> None:
        parts.append([copy.main_grad.clone() for copy in copies])
        groups = ProcessGroupCollection.use_mpu_process_groups()
        finalize_model_grads(model, num_tokens, **(kwargs | {"pg_collection": groups}))
        gradients.append([copy.main_grad.clone() for copy in copies])
        tokens.append(num_tokens.clone())

    chunks[0].config.finalize_model_grads_func = finalize
    weights = [[copy.detach().clone() for copy in copies]]
    for _ in range(steps):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        ranks._run(wrapped, vlm_step, ranks._mine(packs), forward_only=False)
        optimizer.step()
        weights.append([copy.detach().clone() for copy in copies])
    return {"weights": weights, "parts": parts, "gradients": gradients, "tokens": tokens}


def copies_of_embedding(chunks: Sequence[Qwen3VLModel]) -> list[torch.nn.Parameter]:
    """Each parameter of this rank that is a copy of the word embedding: as a table, or as the tied head."""
    copies = []
    for chunk in chunks:
        model, head = chunk.language_model, chunk.share_embeddings_and_output_weights and chunk.post_process
        if hasattr(model, "embedding"):
            copies.append(model.embedding.word_embeddings.weight)
        elif head:
            copies.append(model.output_layer.weight)
    return copies
