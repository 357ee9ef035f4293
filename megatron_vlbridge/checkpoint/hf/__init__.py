"""Hugging Face folders: safetensors, the Hub, FP8 weights and the files beside them."""
