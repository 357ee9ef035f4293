"""The whole path on a laptop (`python -m megatron_vlbridge.demo`): digits, a small Qwen3-VL, Megatron and back."""
