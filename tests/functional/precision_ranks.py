"""What runs inside the workers of `test_precision.py`."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_vlbridge.checkpoint.live import export_hf_weights, load_hf_weights
from megatron_vlbridge.training.batch import read_pack
from tests.functional import ranks
from tests.functional.pool import Layout


def train_in_bf16(
    layout: Layout, folder: Path, pack: dict[str, torch.Tensor], lr: float, distributed: bool
) -> dict[str, Any]:
    """The names of parameters in fp32, and the weights before and after one step of Megatron's Adam."""
    (chunk,) = ranks.build_chunks(layout, folder, load=False, params_dtype=torch.bfloat16, bf16=True)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(chunk.config, ddp, Float16Module(chunk.config, chunk))
    load_hf_weights(model, folder)
    options = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=0.0,
        clip_grad=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(options, [model])
    # The optimizer's fp32 copies were made of the weights before they were loaded.
    optimizer.reload_model_params()
    before = list(export_hf_weights(model))
    inputs = read_pack({key: value[None] for key, value in pack.items()}, chunk.hf_config)
    model(inputs=inputs).sum().backward()
    finalize_model_grads([model], pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    optimizer.step()
    return {
        "fp32": {name for name, parameter in chunk.named_parameters() if parameter.dtype == torch.float32},
        "before": before,
        "after": list(export_hf_weights(model)),
    }


def fill_in_bf16(layout: Layout, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The weights of a bf16 model that was filled from `folder`, and of one that Megatron's loader filled."""
    exported = {}
    for name in ("filled", "loaded"):
        (chunk,) = ranks.build_chunks(layout, folder, load=False, params_dtype=torch.bfloat16, bf16=True)
        model = Float16Module(chunk.config, chunk)
        if name == "filled":
            load_hf_weights(model, folder)
        else:
            state = dist_checkpointing.load(chunk.sharded_state_dict(), str(checkpoint / "release"))
            chunk.load_state_dict({key: value for key, value in state.items() if key in chunk.state_dict()})
        exported[name] = list(export_hf_weights(model))
    return exported
