"""The functions of apex's extension of this name, which Megatron calls where it fuses gradient accumulation."""

from collections import Counter

import torch

CALLS: Counter[str] = Counter()


def wgrad_gemm_accum_fp32(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
    """Adds the gradient of a weight `[out, in]` to `main_grad` in fp32, in place.

    `x` `[T, in]` are the layer's inputs and `grad` `[T, out]` the gradients of its outputs, both of one dtype.

    Called by `LinearWithGradAccumulationAndAsyncCommunication` (core/tensor_parallel/layers.py) for the output layer.
    """
    assert (x.dim(), grad.dim(), x.dtype, main_grad.dtype) == (2, 2, grad.dtype, torch.float32)
    assert main_grad.is_contiguous(), "the kernel writes rows one after the other"
    CALLS["wgrad_gemm_accum_fp32"] += 1
    main_grad += grad.float().t() @ x.float()
