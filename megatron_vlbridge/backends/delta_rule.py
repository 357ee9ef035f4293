"""The gated delta rule and the short convolution of linear attention over packs, in torch and fp32.

Megatron's `GatedDeltaNet` calls them as it calls flash-linear-attention's kernels. For each head, with a state S
`[K, V]` that is zero where a segment begins, token t computes

    S_t = exp(g_t) S_(t-1) + k_t (beta_t (v_t - exp(g_t) S_(t-1)' k_t))'        o_t = S_t' q_t

Source: Yang et al., "Gated Delta Networks" (arXiv 2412.06464), section 3. As there, the tokens of a chunk are solved
for together, and the state passes from chunk to chunk. The chunks are cut out of the whole pack, across segments; masks
keep the segments apart. So there is no loop over segments and no host sync.

Shape letters: B packs of T tokens, H heads, K and V dims of a key and a value, N chunks of C tokens, D channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, silu

from megatron_vlbridge.errors import VLBridgeError

CHUNK = 64


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x` over its norm in the last dim: `x / sqrt(sum(x^2) + eps)`; in fp32, returned in the dtype of `x`."""
    y = x.float()
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """SiLU of each channel of `x` `[B, T, D]` convolved with its `weight` `[D, width]`, inside the segments.

    The convolution is `sum_j weight[width - 1 - j] x_(t - j)`, j from 0 on; in fp32, returned in the dtype of `x`.
    """
    _reject("causal_conv1d", unused)
    if activation not in ("silu", "swish"):
        raise VLBridgeError(f"CPU backend: causal_conv1d: activation must be 'silu' or 'swish', found {activation!r}")
    tokens, width = x.shape[1], weight.shape[1]
    ids = _segment_ids(cu_seqlens, tokens, x.device)
    # Cast once, so that gradients are summed in fp32.
    wide, taps = x.float(), weight.float()
    y = wide * taps[:, -1]
    for distance in range(1, min(width, tokens)):
        same = ids[distance:] == ids[:-distance]
        earlier = wide[:, :-distance].masked_fill(~same[:, None], 0.0)
        y = y + pad(earlier * taps[:, -1 - distance], (0, 0, distance, 0))
    if bias is not None:
        y = y + bias.float()
    return silu(y).to(x.dtype), None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """`q`, `k` `[B, T, H, K]`, `v` `[B, T, H, V]`, log decay `g` and `beta` `[B, T, H]` -> `[B, T, H, V]`.

    `q` is scaled by `1 / sqrt(K)`. `cu_seqlens` `[segments + 1]` are those of a pack (B = 1); without it each of the B
    sequences is one segment. In fp32, returned in the dtype of `q`.
    """
    _reject("chunk_gated_delta_rule", unused)
    tokens, dtype = q.shape[1], q.dtype
    ids = _segment_ids(cu_seqlens, tokens, q.device)
    q_c, k_c, v_c, g_c, beta_c = (_chunks(x.float()) for x in (q, k, v, g, beta))
    decay = _decays(g_c, _chunk_ids(ids))
    q_c = q_c * q.shape[-1] ** -0.5
    k_beta = k_c * beta_c[..., None]

    # Each token's correction depends on those of earlier tokens in its chunk: a triangular system, solved at once for
    # what the values and what the incoming state contribute.
    system = (k_beta @ k_c.mT) * decay.within
    both = torch.cat((v_c * beta_c[..., None], k_beta * decay.entering), dim=-1)
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    new, seen = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    output = _scan(
        new, seen, (q_c @ k_c.mT) * decay.within, q_c * decay.entering, (k_c * decay.leaving).mT, decay.through
    )
    return output.flatten(2, 3)[:, :, :tokens].transpose(1, 2).to(dtype), None


def _scan(
    new: torch.Tensor,
    seen: torch.Tensor,
    local: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    through: torch.Tensor,
) -> torch.Tensor:
    """The outputs `[B, H, N, C, V]`, chunk by chunk; each argument has the chunks in dim 2."""
    outputs = []
    state = new.new_zeros(*new.shape[:2], k.shape[-2], new.shape[-1])
    # The backward of `unbind` is one stack; that of an index would write a whole tensor of zeros for each chunk.
    for new_c, seen_c, local_c, q_c, k_c, through_c in zip(
        *(x.unbind(2) for x in (new, seen, local, q, k, through)), strict=True
    ):
        value = new_c - seen_c @ state
        outputs.append(q_c @ state + local_c @ value)
        state = state * through_c + k_c @ value
    return torch.stack(outputs, dim=2)


@dataclass(frozen=True)
class _Decays:
    """Products of decays in each chunk, zero from one segment to another.

    `within` `[B, H, N, C, C]`: from token j to token i >= j. `entering` `[B, H, N, C, 1]`: from the end of the previous
    chunk to token i. `leaving` `[B, H, N, C, 1]`: from token j to the end of the chunk. `through` `[B, H, N, 1, 1]`:
    from the end of the previous chunk to the end of this one.
    """

    within: torch.Tensor
    entering: torch.Tensor
    leaving: torch.Tensor
    through: torch.Tensor


def _decays(g: torch.Tensor, ids: torch.Tensor) -> _Decays:
    """Of the log decays `g` `[B, H, N, C]` and the segments `ids` `[N, C]` of the tokens."""
    chunk = ids.shape[1]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=ids.device).tril()
    visible = (ids[:, :, None] == ids[:, None, :]) & causal
    # Entry (i, j) is g_(j + 1) + ... + g_i, summed on its own: a difference of two sums over the chunk would lose the
    # digits that the gradients of `g` need, and would be rounded by what other segments hold.
    steps = g[..., :, None].expand(*g.shape, chunk).tril(-1).cumsum(-2)
    within = _exp_where(visible, steps)
    # Since the chunk's or the segment's beginning.
    total = (visible.float() @ g[..., None])[..., 0]
    incoming = torch.cat((ids.new_full((1,), -2), ids[:-1, -1]))
    enters, leaves = ids == incoming[:, None], ids == ids[:, -1:]
    return _Decays(
        within=within,
        entering=_exp_where(enters, total)[..., None],
        leaving=within[..., -1, :, None],
        through=_exp_where((enters & leaves)[:, -1], total[..., -1])[..., None, None],
    )


def _exp_where(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(~mask, float("-inf")).exp()


def _segment_ids(cu_seqlens: torch.Tensor | None, tokens: int, device: torch.device) -> torch.Tensor:
    """`[T]`: the index of each token's segment."""
    if cu_seqlens is None:
        return torch.zeros(tokens, dtype=torch.int64, device=device)
    return torch.bucketize(torch.arange(tokens, device=device), cu_seqlens[1:].long(), right=True)


def _chunk_ids(ids: torch.Tensor) -> torch.Tensor:
    """`[T]` -> `[N, C]`; the tokens that fill the last chunk are a segment of their own."""
    return pad(ids, (0, -len(ids) % CHUNK), value=-1).view(-1, CHUNK)


def _chunks(x: torch.Tensor) -> torch.Tensor:
    """`[B, T, H, ...]` -> `[B, H, N, C, ...]`, filled with zeros."""
    filled = pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % CHUNK))
    return filled.unflatten(1, (-1, CHUNK)).movedim(3, 1)


def _reject(function: str, unused: dict[str, Any]) -> None:
    """Reject what Megatron never asks for: a state to continue from, the last state, norms inside the kernel."""
    for name, value in unused.items():
        if value is not None and value is not False:
            raise VLBridgeError(f"CPU backend: {function}: {name} must be None or False, as Megatron passes it")


def install() -> None:
    """Give Megatron's `GatedDeltaNet` these kernels, in place of flash-linear-attention's."""
    from megatron.core.ssm.gated_delta_net import common, gdn

    common.HAVE_FLA = True
    common.l2norm = l2norm
    gdn.causal_conv1d = causal_conv1d
    gdn.chunk_gated_delta_rule = chunk_gated_delta_rule
