"""Megatron's `torch_dist` checkpoints: read and written region by region, through torch's distributed checkpoint."""
