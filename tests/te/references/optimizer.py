"""Operations on lists of tensors: Adam, norms and scaling, as Transformer Engine's multi-tensor kernels have them.

`chunk_size` says how kernels divide the work, `noop` `[1]` is set by a kernel that meets a value that is not finite.
"""

from collections.abc import Sequence

import torch

Lists = Sequence[Sequence[torch.Tensor]]


def multi_tensor_adam(
    chunk_size: int,
    noop: torch.Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One step of AdamW (Loshchilov & Hutter, algorithm 2) in place; `step` counts from 1.

    `lists` are gradients, parameters, first and second moments.

    Called by `FusedAdam.step` (optimizers/fused_adam.py).
    """
    assert (decoupled, bias_correction, int(noop)) == (1, 1, 0)
    for grad, parameter, first, second in zip(*lists, strict=True):
        assert {x.dtype for x in (grad, parameter, first, second)} == {torch.float32}
        assert {x.shape for x in (grad, parameter, first, second)} == {grad.shape}
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (second / (1 - beta2**step)).sqrt() + eps
        parameter.sub_(lr * (first / (1 - beta1**step) / root + weight_decay * parameter))


def multi_tensor_l2norm(
    chunk_size: int, noop: torch.Tensor, lists: Lists, per_tensor: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm `[1]` of all elements of the one list in fp32, and (not asked for here) none of single tensors.

    Called by `get_grad_norm_fp32` (Megatron's core/optimizer/clip_grads.py).
    """
    assert not per_tensor
    (tensors,) = lists
    norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors])
    return torch.linalg.vector_norm(norms)[None], torch.empty(0)


def multi_tensor_scale_tensor(chunk_size: int, noop: torch.Tensor, lists: Lists, scale: torch.Tensor) -> None:
    """Puts the tensors of the first list, times `scale` `[1]`, into those of the second.

    Called by `clip_grad_by_total_norm_fp32` (Megatron's core/optimizer/clip_grads.py).
    """
    assert scale.shape == (1,)
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
