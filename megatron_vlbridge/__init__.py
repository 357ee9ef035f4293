"""Train Qwen vision-language models on Megatron-Core, from a Hugging Face checkpoint and back to one.

Every supported layout is verified equal to transformers on CPU processes; what is not verified is rejected.
"""

import importlib
from typing import TYPE_CHECKING, Any

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError

if TYPE_CHECKING:
    from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
    from megatron_vlbridge.checkpoint.inspect import inspect
    from megatron_vlbridge.checkpoint.live import export_hf_weights, hf_weight_specs, load_hf_weights, save_hf
    from megatron_vlbridge.checkpoint.peft.merge import merge_adapter
    from megatron_vlbridge.checkpoint.verify import verify
    from megatron_vlbridge.data.samples import check_batch, select_samples, split_global_batch
    from megatron_vlbridge.families import read_config
    from megatron_vlbridge.layout.batch_layout import BatchLayout
    from megatron_vlbridge.model.vlm import Qwen3VLModel
    from megatron_vlbridge.training.pretrain import model_provider
    from megatron_vlbridge.training.step import vlm_step

# Imported when first asked for: a converter needs no Megatron, and the CPU runtime must be enabled before Megatron is.
_HOMES = {
    "BatchLayout": "layout.batch_layout",
    "Qwen3VLModel": "model.vlm",
    "check_batch": "data.samples",
    "export_checkpoint": "checkpoint.convert",
    "export_hf_weights": "checkpoint.live",
    "hf_weight_specs": "checkpoint.live",
    "import_checkpoint": "checkpoint.convert",
    "inspect": "checkpoint.inspect",
    "load_hf_weights": "checkpoint.live",
    "merge_adapter": "checkpoint.peft.merge",
    "model_provider": "training.pretrain",
    "read_config": "families",
    "save_hf": "checkpoint.live",
    "select_samples": "data.samples",
    "split_global_batch": "data.samples",
    "verify": "checkpoint.verify",
    "vlm_step": "training.step",
}

__all__ = [
    "BatchLayout",
    "Config",
    "Qwen3VLModel",
    "VLBridgeError",
    "check_batch",
    "export_checkpoint",
    "export_hf_weights",
    "hf_weight_specs",
    "import_checkpoint",
    "inspect",
    "load_hf_weights",
    "merge_adapter",
    "model_provider",
    "read_config",
    "save_hf",
    "select_samples",
    "split_global_batch",
    "verify",
    "vlm_step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
