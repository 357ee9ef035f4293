"""Which kernels run: reference kernels on the CPU, or Transformer Engine."""
