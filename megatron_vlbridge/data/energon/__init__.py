"""Megatron Energon as the reader of conversations (the extra `energon`): its packs are those of `vlm_step`."""
