"""The kernels of gated delta net layers in plain torch: causal convolution, l2 norm and the chunked gated delta rule.

Each takes the arguments with which Megatron-Core's `GatedDeltaNet` calls the kernel of flash-linear-attention, and is
differentiable. Packs are given by `cu_seqlens`; nothing crosses a segment: neither values nor gradients of one segment
depend on another, even if that one holds NaN. Computed in fp32, without synchronisation of host and device.

`cu_seqlens` `[S + 1]` begins with 0 and ends with T, which Megatron checks and which is not read here.
"""

import torch

from megatron_vlbridge.backends.token_chunks import TokenChunks, pack_bounds, segments_of_tokens
from megatron_vlbridge.errors import VLBridgeError

# Slots of a chunk. Half a chunk of each segment is empty on average, and the work on pairs of tokens grows with it; in
# short chunks the work on the states counts. benchmarks/linear_attention.py is fastest with 32.
CHUNK = 32


def install() -> None:
    """Let Megatron's `GatedDeltaNet` use these kernels, whether or not flash-linear-attention is installed.

    Megatron binds the names when it is imported, in the module of the layer and again where it is used.
    """
    from megatron.core.ssm import gated_delta_net
    from megatron.core.ssm.gated_delta_net import common, gdn

    common.HAVE_FLA = gated_delta_net.HAVE_FLA = True
    common.l2norm = gated_delta_net.l2norm = l2norm
    common.causal_conv1d = gdn.causal_conv1d = gated_delta_net.causal_conv1d = causal_conv1d
    common.chunk_gated_delta_rule = gdn.chunk_gated_delta_rule = chunk_gated_delta_rule
    gated_delta_net.chunk_gated_delta_rule = chunk_gated_delta_rule


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """`x / sqrt(sum(x ** 2) + 1e-6)` over the last dimension, in the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """SiLU of the depthwise convolution of each token with the `W - 1` before it in its segment.

    Takes `x` `[B, T, D]`, `weight` `[D, W]`, whose last column is for the token itself, and `bias` `[D]`; gives
    `[B, T, D]` in the dtype of `x`, and None in place of a final state.

    Raises:
        VLBridgeError: for another activation, a state, or shapes that do not match.
    """
    _reject("causal_conv1d", initial_state=initial_state, output_final_state=output_final_state)
    if activation not in ("silu", "swish"):
        raise VLBridgeError(
            f"CPU backend: causal_conv1d: activation must be 'silu' or 'swish', found {activation!r}; "
            "a gated delta net has activation_func=torch.nn.functional.silu"
        )
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise VLBridgeError(
            "CPU backend: causal_conv1d: expected x [B, T, D] and weight [D, W], "
            f"found {list(x.shape)} and {list(weight.shape)}"
        )
    _check_pack("causal_conv1d", x, cu_seqlens)
    tokens, width = x.shape[1], weight.shape[1]
    _, position = segments_of_tokens(pack_bounds(cu_seqlens, tokens, x.device), tokens)
    wide, taps = x.float(), weight.float().unbind(1)
    out = wide * taps[-1]
    for back in range(1, width):
        # What comes from the end of the pack is masked too: no token has a position after its place in the pack.
        earlier = torch.roll(wide * taps[-1 - back], back, dims=1)
        out = out + earlier.masked_fill((position < back)[:, None], 0)
    if bias is not None:
        out = out + bias.float()
    return torch.nn.functional.silu(out).to(x.dtype), None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    r"""The gated delta rule (Yang et al., "Gated Delta Networks", arXiv 2412.06464), segment by segment.

    Each head has a state `S` `[K, V]`, zero at the beginning of a segment, which token `t` decays, corrects and reads:

        S_t = exp(g_t) S_{t-1} + k_t u_t^T    with  u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
        o_t = S_t^T q_t / sqrt(K)

    Takes `q`, `k` `[B, T, H, K]` with one head for each of `v` `[B, T, H, V]`, and `g` (log of the decay, at most 0)
    and `beta` `[B, T, H]`; gives `[B, T, H, V]` in the dtype of `q`, and None in place of a final state. The memory
    held for the backward pass is linear in T.

    Raises:
        VLBridgeError: for a state, the norm inside the kernel, or shapes that do not match.
    """
    _reject(
        "chunk_gated_delta_rule",
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    _check_heads(q, k, v, g, beta)
    _check_pack("chunk_gated_delta_rule", q, cu_seqlens)
    batch, tokens = q.shape[:2]
    chunks = TokenChunks.from_bounds(pack_bounds(cu_seqlens, tokens, q.device), tokens, CHUNK)
    out = _chunked_rule(*(chunks.split(x).float() for x in (q, k, v, g, beta)), chunks.begins)
    return chunks.join(out * q.shape[-1] ** -0.5, batch).to(q.dtype), None


def _chunked_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, begins: torch.Tensor
) -> torch.Tensor:
    """The rule without its scale, from `[N, P, C, ...]` by chunks to `[N, P, C, V]`; `P` are heads and batch.

    Unrolled over a chunk (rows are tokens, `S` is the state before it, `d_i` the decay of its first i tokens,
    `D_ij = d_i / d_j` that between two), the corrections `U` solve a triangular system, and output and next state
    follow. With `M = tril(D * QK^T)`, `d_C` of the whole chunk and `*` by elements or rows:

        (1 + diag(beta) tril(D * KK^T, -1)) U = beta * (V - d * KS)
        O  = d * QS + MU
        S' = d_C S + K^T (d_C / d * U)

    This is the WY form of the paper's section 3.3 with the inverse of the system kept apart from its right side. All
    but the chain of the states is computed for all chunks at once.
    """
    slots = k.shape[2]
    key_query = torch.cat((k, q), dim=2)
    keys, queries = (key_query @ k.mT).split(slots, dim=2)
    from_start, between, to_end = _decays(g)
    system = keys * between * beta[..., None]
    identity = torch.eye(slots, device=k.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    return _scan(
        key_query, k, v, inverse * beta[..., None, :], queries * between, from_start.repeat(1, 1, 2), to_end, begins
    )


def _decays(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From log decays `[N, P, C]`: of the tokens up to each, between each two `[N, P, C, C]`, and of those after each.

    The log decay between two tokens is a difference of two sums, whose gradients cancel: both are in fp64. In fp32 the
    gradients of the decay parameters would have errors of up to 1e-2.
    """
    total = g.double().cumsum(-1)
    difference = (total[..., :, None] - total[..., None, :]).float()
    slots = g.shape[-1]
    later = torch.ones(slots, slots, dtype=torch.bool, device=g.device).triu(1)
    between = difference.masked_fill(later, -torch.inf).exp()
    return total.float().exp(), between, between[..., -1, :]


def _scan(
    key_query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inverse: torch.Tensor,
    inner: torch.Tensor,
    from_start: torch.Tensor,
    to_end: torch.Tensor,
    begins: torch.Tensor,
) -> torch.Tensor:
    """Chunk by chunk: read the state `[P, K, V]`, correct it, hand it on unless the next chunk begins a segment."""
    state = k.new_zeros(k.shape[1], k.shape[3], v.shape[3])
    outputs = []
    # Not by index: its backward pass writes a tensor of the size of all chunks for each chunk.
    chunks = (key_query, k.mT, v, inverse, inner, from_start[..., None], to_end[..., None], begins)
    for key_query_n, key_n, v_n, inverse_n, inner_n, from_start_n, to_end_n, begins_n in zip(
        *(x.unbind(0) for x in chunks), strict=True
    ):
        # Not by a factor of zero, which would keep NaN.
        state = state.masked_fill(begins_n, 0)
        read_by_keys, read_by_queries = (torch.bmm(key_query_n, state) * from_start_n).split(k.shape[2], dim=1)
        correction = torch.bmm(inverse_n, v_n - read_by_keys)
        outputs.append(torch.baddbmm(read_by_queries, inner_n, correction))
        state = torch.baddbmm(state * from_start_n[:, -1:], key_n, correction * to_end_n)
    return torch.stack(outputs)


def _reject(function: str, **arguments: object) -> None:
    """Raise for an argument that Megatron passes with one value only, None or False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise VLBridgeError(
                f"CPU backend: {function}: {name} must be None or False, as in Megatron's GatedDeltaNet, "
                f"found {value if isinstance(value, bool) else type(value).__name__}"
            )


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> None:
    arguments = (q, k, v, g, beta)
    dims = [x.dim() for x in arguments]
    if dims != [4, 4, 4, 3, 3] or q.shape != k.shape or len({x.shape[:3] for x in arguments}) != 1:
        raise VLBridgeError(
            "CPU backend: chunk_gated_delta_rule: expected q and k [B, T, H, K], v [B, T, H, V], g and beta [B, T, H], "
            f"found {[list(x.shape) for x in arguments]}; repeat the heads of q and k to those of v before the call"
        )


def _check_pack(function: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    batch, tokens = x.shape[:2]
    if tokens == 0:
        raise VLBridgeError(f"CPU backend: {function}: expected at least one token, found {list(x.shape)}")
    if cu_seqlens is None:
        return
    if batch != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise VLBridgeError(
            f"CPU backend: {function}: with cu_seqlens expected a batch of 1 and integers [S + 1], found a batch of "
            f"{batch} and {cu_seqlens.dtype} {list(cu_seqlens.shape)}; put the sequences one after the other"
        )
