"""The Megatron modules of the model."""
