"""The whole path on a laptop (`python -m megatron_vlbridge.demo`): digits, a small model, Megatron and back."""
