"""Folders of LoRA adapters as peft writes them."""
