"""Running, sharded Megatron models: filled from and written as Hugging Face checkpoints."""

from megatron_vlbridge.checkpoint.live.delta import WeightDigests
from megatron_vlbridge.checkpoint.live.export import export_hf_weights
from megatron_vlbridge.checkpoint.live.load import load_hf_weights, load_torch_dist_weights
from megatron_vlbridge.checkpoint.live.save import save_hf
from megatron_vlbridge.checkpoint.live.specs import hf_weight_specs

__all__ = [
    "WeightDigests",
    "export_hf_weights",
    "hf_weight_specs",
    "load_hf_weights",
    "load_torch_dist_weights",
    "save_hf",
]
