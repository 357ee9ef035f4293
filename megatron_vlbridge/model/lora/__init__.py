"""LoRA: two small trained matrices beside each projection of a frozen model (arXiv 2106.09685), as `peft` has them."""
