"""Attention of packed segments (THD): cuDNN's fused kernels, and the conversions around the unfused one."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    qkv_layout: Any,
    o_format: Any,
    scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window: Sequence[int],
    bottom_right_diagonal: bool,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: torch.Tensor | None,
    cu_seqlens_kv_padded: torch.Tensor | None,
    page_table_k: None,
    page_table_v: None,
    s_quantizer: None,
    o_quantizer: None,
    bias: None,
    softmax_offset: None,
    rng: Any,
    rng_elements: int,
    return_max_logit: bool,
    cuda_graph: bool,
) -> list[torch.Tensor]:
    """The output `[T, N, D]`, the log-sum-exp of the scaled scores `[T, N, 1]` in fp32, and a random state.

    `q` `[T, N, D]`, `k` and `v` `[T', N', D]`, where a head of these serves N / N' heads of queries. Segment i is
    `cu_seqlens[i + 1] - cu_seqlens[i]` tokens long and starts at `cu_seqlens_padded[i]` (None: at `cu_seqlens[i]`);
    `max_seqlen` bounds the lengths. Rows outside all segments are NaN here, so that their use shows.

    Called by `fused_attn_fwd` (cpp_extensions/fused_attn.py) for `FusedAttention`, under context parallelism once for
    each step of the exchange.
    """
    _check(qkv_layout, bias_type, softmax_type, mask_type, window, dropout)
    assert (s_quantizer, o_quantizer, page_table_k, page_table_v, return_max_logit) == (None, None, None, None, False)
    segments = _segments(
        (cu_seqlens_q, cu_seqlens_q_padded, max_seqlen_q, q), (cu_seqlens_kv, cu_seqlens_kv_padded, max_seqlen_kv, k)
    )
    out = torch.full_like(q, float("nan"))
    lse = q.new_full((*q.shape[:2], 1), float("nan"), dtype=torch.float32)
    for rows, keys in segments:
        scores = _scores(q[rows], k[keys], scale, mask_type)
        of_segment = scores.logsumexp(-1, keepdim=True)
        values = _repeated(v[keys], q.shape[1])
        out[rows] = ((scores - of_segment).exp() @ values).transpose(0, 1).to(q.dtype)
        lse[rows] = of_segment.transpose(0, 1)
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    qkv_layout: Any,
    o_format: Any,
    do_format: Any,
    dqkv_layout: Any,
    scale_inv_format: Any,
    do_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window: Sequence[int],
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    grad: torch.Tensor,
    fake_dtype: torch.dtype,
    saved: Sequence[torch.Tensor],
    cu_seqlens_q_padded: torch.Tensor | None,
    cu_seqlens_kv_padded: torch.Tensor | None,
    s_quantizer: None,
    dp_quantizer: None,
    dqkv_quantizer: None,
    cuda_graph: bool,
) -> list[torch.Tensor | None]:
    """Gradients of `q`, `k`, `v`, and none of a bias and a softmax offset; zero in rows outside all segments.

    `out` and `grad` `[T, N, D]`: the output and its gradient. `saved` begins with the log-sum-exp `[T, N, 1]`. Under
    context parallelism `out` and this are those over the keys of all ranks, of which `k` and `v` are a part.

    Called by `fused_attn_bwd` (cpp_extensions/fused_attn.py) in the backward of `FusedAttention`.
    """
    _check(qkv_layout, bias_type, softmax_type, mask_type, window, dropout)
    assert (s_quantizer, dp_quantizer, dqkv_quantizer) == (None, None, None)
    segments = _segments(
        (cu_seqlens_q, cu_seqlens_q_padded, max_seqlen_q, q), (cu_seqlens_kv, cu_seqlens_kv_padded, max_seqlen_kv, k)
    )
    lse = saved[0]
    assert (out.shape, grad.shape, lse.shape) == (q.shape, q.shape, (*q.shape[:2], 1))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for rows, keys in segments:
        queries, outputs, grads = (x[rows].transpose(0, 1).float() for x in (q, out, grad))
        probabilities = (_scores(q[rows], k[keys], scale, mask_type) - lse[rows].transpose(0, 1)).exp()
        of_probabilities = grads @ _repeated(v[keys], q.shape[1]).transpose(1, 2)
        of_scores = scale * probabilities * (of_probabilities - (grads * outputs).sum(-1, keepdim=True))
        dq[rows] = (of_scores @ _repeated(k[keys], q.shape[1])).transpose(0, 1).to(q.dtype)
        dk[keys] = _summed(of_scores.transpose(1, 2) @ queries, k.shape[1]).to(k.dtype)
        dv[keys] = _summed(probabilities.transpose(1, 2) @ grads, v.shape[1]).to(v.dtype)
    return [dq, dk, dv, None, None]


def convert_thd_to_bshd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, batch: int, max_seqlen: int) -> torch.Tensor:
    """Segments of `[T, N, D]` as the rows of `[batch, max_seqlen, N, D]`, zeros after them.

    Called by `UnfusedDotProductAttention` before its matrix products, and by the backward of `convert_bshd_to_thd`.
    """
    segments = _of_side(cu_seqlens, None, max_seqlen, tensor)
    assert len(segments) == batch
    out = tensor.new_zeros(batch, max_seqlen, *tensor.shape[1:])
    for row, tokens in zip(out, segments, strict=True):
        row[: tokens.stop - tokens.start] = tensor[tokens]
    return out


def convert_bshd_to_thd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """The reverse of `convert_thd_to_bshd`, of `total` tokens; those outside all segments are NaN.

    Called by `UnfusedDotProductAttention` after its matrix products, and by the backward of `convert_thd_to_bshd`.
    """
    out = tensor.new_full((total, *tensor.shape[2:]), float("nan"))
    for row, tokens in zip(tensor, _of_side(cu_seqlens, None, tensor.shape[1], out), strict=True):
        out[tokens] = row[: tokens.stop - tokens.start]
    return out


def scaled_masked_softmax_forward(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax over the keys of scaled scores `[batch, N, n, m]`; `mask` `[1 or batch, 1, n, m]` is true where not seen.

    A row that sees nothing is zero.

    Called by `FusedScaleMaskSoftmax` in `UnfusedDotProductAttention`, for 16 bits and sizes that are multiples of 4.
    """
    assert mask.dtype == torch.bool
    assert mask.shape in [(batch, 1, *x.shape[2:]) for batch in (1, len(x))], (mask.shape, x.shape)
    probabilities = (scale * x.float()).masked_fill(mask, float("-inf")).softmax(-1)
    return probabilities.nan_to_num(0.0).to(x.dtype)


def scaled_masked_softmax_backward(grad: torch.Tensor, probabilities: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of the scores, from that of the `probabilities` `[batch, N, n, m]`.

    Called by the backward of the above.
    """
    weighted = grad.float() * probabilities.float()
    return (scale * (weighted - probabilities.float() * weighted.sum(-1, keepdim=True))).to(grad.dtype)


def _check(
    qkv_layout: Any, bias_type: Any, softmax_type: Any, mask_type: Any, window: Sequence[int], dropout: float
) -> None:
    kinds = qkv_layout.name, bias_type.name, softmax_type.name, dropout
    assert kinds == ("NVTE_THD_THD_THD", "NVTE_NO_BIAS", "NVTE_VANILLA_SOFTMAX", 0.0), f"no reference for {kinds}"
    causal = mask_type.name in ("NVTE_PADDING_CAUSAL_MASK", "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK")
    assert causal or mask_type.name == "NVTE_PADDING_MASK", f"no reference for {mask_type.name}"
    assert tuple(window) in ([(-1, -1), (-1, 0)] if causal else [(-1, -1)]), (mask_type.name, window)


Side = tuple[torch.Tensor, torch.Tensor | None, int, torch.Tensor]


def _segments(queries: Side, keys: Side) -> Iterator[tuple[slice, slice]]:
    return zip(_of_side(*queries), _of_side(*keys), strict=True)


def _of_side(
    cu_seqlens: torch.Tensor, padded: torch.Tensor | None, max_seqlen: int, tensor: torch.Tensor
) -> list[slice]:
    """Where each segment is in `tensor` `[T, N, D]`."""
    offsets = cu_seqlens if padded is None else padded
    assert cu_seqlens.dtype == offsets.dtype == torch.int32, "a kernel reads 32 bits"
    assert cu_seqlens.shape == offsets.shape
    lengths, starts = cu_seqlens.diff().tolist(), offsets.tolist()
    assert max(lengths) <= max_seqlen, f"a segment of {max(lengths)} tokens, max_seqlen is {max_seqlen}"
    assert starts[-1] <= len(tensor), f"segments end at {starts[-1]} of {len(tensor)} tokens"
    ends = [start + length for start, length in zip(starts[:-1], lengths, strict=True)]
    assert all(end <= following for end, following in zip(ends, starts[1:], strict=True)), (lengths, starts)
    return [slice(start, end) for start, end in zip(starts[:-1], ends, strict=True)]


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, mask_type: Any) -> torch.Tensor:
    """Scaled scores `[N, n, m]` of one segment's n queries and m keys, minus infinity where masked."""
    scores = scale * (q.transpose(0, 1).float() @ _repeated(k, q.shape[1]).transpose(1, 2))
    if mask_type.name == "NVTE_PADDING_MASK":
        return scores
    diagonal = len(k) - len(q) if mask_type.name == "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK" else 0
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(diagonal), float("-inf"))


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values `[m, N', D]` of one segment, for each of the N heads of queries: `[N, m, D]` in fp32."""
    assert heads % x.shape[1] == 0, (heads, x.shape)
    return x.transpose(0, 1).float().repeat_interleave(heads // x.shape[1], 0)


def _summed(x: torch.Tensor, heads: int) -> torch.Tensor:
    """The gradient `[m, N', D]` of what `_repeated` repeated."""
    return x.unflatten(0, (heads, -1)).sum(1).transpose(0, 1)
