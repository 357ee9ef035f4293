"""The functions of flash-linear-attention that Megatron's `GatedDeltaNet` calls, in torch, token by token.

The installed package is imported, by Megatron too; its kernels are in Triton and need a GPU. A call must fit the
signature of the installed function, and what a reference does not compute fails.

Shapes: B batches of T tokens, D channels of a convolution, H heads, K and V dims of a key and a value.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

CALLS: Counter[str] = Counter()


def install() -> None:
    """Let Megatron call the references, where it would call the installed functions."""
    from megatron.core.ssm.gated_delta_net import common, gdn

    assert common.HAVE_FLA, "Megatron could not import flash-linear-attention"
    common.l2norm = _in_place_of(common.l2norm, l2norm)
    gdn.causal_conv1d = _in_place_of(gdn.causal_conv1d, causal_conv1d)
    gdn.chunk_gated_delta_rule = _in_place_of(gdn.chunk_gated_delta_rule, chunk_gated_delta_rule)


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x` over the norm of its last dim.

    Called by `_prepare_input_for_gated_delta_rule` for queries and keys.
    """
    y = x.float()
    return (y / (y.pow(2).sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    initial_state: None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """SiLU of the convolution of each channel of `x` `[B, T, D]` with its `weight` `[D, width]`, segment by segment.

    Called by `GatedDeltaNet.forward` for queries, keys and values together.
    """
    assert (bias, initial_state, output_final_state, activation) == (None, None, False, "silu")
    assert weight.dim() == 2
    assert weight.shape[0] == x.shape[2]
    width = weight.shape[1]
    outputs = [
        F.conv1d(F.pad(segment.float().mT, (width - 1, 0)), weight.float()[:, None], groups=len(weight)).mT
        for segment in x.split(_lengths(x, cu_seqlens), dim=1)
    ]
    return F.silu(torch.cat(outputs, dim=1)).to(x.dtype), None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule: `q`, `k` `[B, T, H, K]`, `v` `[B, T, H, V]`, `g`, `beta` `[B, T, H]` -> `[B, T, H, V]`.

    Called by `GatedDeltaNet.forward`, with queries and keys repeated to the heads of the values.
    """
    assert (initial_state, output_final_state, use_qk_l2norm_in_kernel) == (None, False, False)
    assert q.dtype == k.dtype == v.dtype
    assert q.shape == k.shape
    assert q.shape[:3] == v.shape[:3] == g.shape == beta.shape
    lengths = _lengths(q, cu_seqlens)
    segments = zip(*(x.float().split(lengths, dim=1) for x in (q, k, v, g.exp(), beta)), strict=True)
    return torch.cat([_recurrence(*segment) for segment in segments], dim=1).to(q.dtype), None


def _recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """One segment: each token lets the state decay, replaces what it holds for its key, and reads it."""
    state = q.new_zeros(*q.shape[::2], k.shape[3], v.shape[3])
    outputs = []
    for q_t, k_t, v_t, decay_t, beta_t in zip(*(x.unbind(1) for x in (q, k, v, decay, beta)), strict=True):
        state = state * decay_t[..., None, None]
        change = (v_t - torch.einsum("bhkv,bhk->bhv", state, k_t)) * beta_t[..., None]
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, change)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_t))
    return torch.stack(outputs, dim=1) * q.shape[3] ** -0.5


def _lengths(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[int]:
    """Of the segments; `cu_seqlens` must reach from the first token to the last."""
    if cu_seqlens is None:
        return [x.shape[1]]
    assert x.shape[0] == 1
    assert cu_seqlens.dtype in (torch.int32, torch.int64)
    ends = cu_seqlens.tolist()
    assert (ends[0], ends[-1]) == (0, x.shape[1]), f"segments {ends} of {x.shape[1]} tokens"
    return [end - start for start, end in pairwise(ends)]


def _in_place_of(installed: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    assert installed.__module__.startswith("fla."), installed
    signature = inspect.signature(installed)

    def call(*args: object, **kwargs: object) -> Any:
        signature.bind(*args, **kwargs)
        CALLS[reference.__name__] += 1
        return reference(*args, **kwargs)

    return call
