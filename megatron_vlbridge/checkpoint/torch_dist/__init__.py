"""Megatron's `torch_dist` checkpoints: read and written region by region, through torch's distributed checkpoint."""

from megatron_vlbridge.checkpoint.torch_dist.locate import locate
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder

__all__ = ["TorchDistFolder", "locate"]
