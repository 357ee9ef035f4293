"""Models of this project behind the names of Megatron-Bridge. Needs Megatron; not Megatron-Bridge."""
