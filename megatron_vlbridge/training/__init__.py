"""What Megatron's pretraining calls."""
