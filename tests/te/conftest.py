"""The tests' own process runs no model; it imports Megatron without the stand-in for Transformer Engine's extension."""

from megatron_vlbridge.backends import cpu_runtime

cpu_runtime.enable()
