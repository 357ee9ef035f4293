"""Tokens of packed segments on context-parallel ranks.

A rank holds two chunks of each segment, one after the other: the halves of the segment's part on this rank.
`cu_seqlens` `[segments + 1]` are the padded offsets of these parts in the rank's tokens.
"""

import torch


def thd_read_half_tensor(tensor: torch.Tensor, cu_seqlens: torch.Tensor, half: int) -> torch.Tensor:
    """The first (0) or second (1) halves of all segments, of `[T, N, D]` or of keys and values `[2, T, N, D]`.

    Called by the p2p exchange (attention/dot_product_attention/context_parallel.py) where a rank's queries see one
    half of another rank's keys, or the reverse.
    """
    axis = tensor.dim() - 3
    return tensor.index_select(axis, _half(cu_seqlens, half, tensor.shape[axis]))


def thd_second_half_lse_correction(
    lse: torch.Tensor, of_step: torch.Tensor, cu_seqlens: torch.Tensor, packed: bool
) -> None:
    """Adds a step's log-sum-exp `[N, T/2]` to the second halves of `lse` `[N, T]`, in place.

    Called by the p2p exchange's forward after a step in which the second halves alone were queries.
    """
    assert packed
    rows = _half(cu_seqlens, 1, lse.shape[1])
    lse[:, rows] = torch.logaddexp(lse[:, rows], of_step)


def thd_out_correction(
    out: torch.Tensor,
    of_step: torch.Tensor,
    old_lse: torch.Tensor,
    new_lse: torch.Tensor,
    lse_of_step: torch.Tensor,
    cu_seqlens: torch.Tensor,
    second_half: bool,
    packed: bool,
) -> None:
    """Merges a step's output into `out` `[T, N, D]`, in place: both weighted by their share of the new log-sum-exp.

    `old_lse` and `new_lse` `[N, T]`; with `second_half`, `of_step` and `lse_of_step` are of the second halves alone.

    Called by the p2p exchange's forward.
    """
    assert packed
    assert out.dtype == of_step.dtype
    rows = _half(cu_seqlens, 1, len(out)) if second_half else torch.arange(len(out))
    old = (old_lse[:, rows] - new_lse[:, rows]).exp().t()[..., None]
    new = (lse_of_step - new_lse[:, rows]).exp().t()[..., None]
    out[rows] = (old * out[rows].float() + new * of_step.view(len(rows), *out.shape[1:]).float()).to(out.dtype)


def thd_read_second_half_lse(lse: torch.Tensor, cu_seqlens: torch.Tensor, packed: bool, length: int) -> torch.Tensor:
    """The second halves `[N, length]` of `lse` `[N, T]`.

    Called by the p2p exchange's backward.
    """
    rows = _half(cu_seqlens, 1, lse.shape[1])
    assert (packed, len(rows)) == (True, length)
    return lse[:, rows]


def thd_grad_correction(
    grad: torch.Tensor, of_step: torch.Tensor, cu_seqlens: torch.Tensor, first: str, second: str
) -> None:
    """Puts a step's gradient into the first and second halves of `grad` `[T, N, D]`, in place.

    What happens to each half is "add", "copy", "zero" or "none"; with the last two, `of_step` is the other half alone.

    Called by the p2p exchange's backward.
    """
    whole = {first, second} <= {"add", "copy"}
    for half, what in enumerate((first, second)):
        rows = _half(cu_seqlens, half, len(grad))
        if what == "add":
            grad[rows] += of_step[rows] if whole else of_step
        elif what == "copy":
            grad[rows] = of_step[rows] if whole else of_step
        elif what == "zero":
            grad[rows] = 0
        else:
            assert what == "none", what


def thd_cp_rank_order_to_sequence_order(
    x: torch.Tensor, cu_seqlens: torch.Tensor, size: int, total: int
) -> torch.Tensor:
    """The tokens `[T, ...]` of all ranks, rank after rank, in the order of the segments.

    `cu_seqlens` are here the padded offsets of whole segments.

    Called by the a2a and all_gather exchanges after the tokens of `size` ranks have been gathered.
    """
    out = torch.empty_like(x)
    out[_rank_order(x, cu_seqlens, size, total)] = x
    return out


def thd_sequence_order_to_cp_rank_order(
    x: torch.Tensor, cu_seqlens: torch.Tensor, size: int, total: int
) -> torch.Tensor:
    """The reverse of `thd_cp_rank_order_to_sequence_order`.

    Called by the a2a and all_gather exchanges before the tokens are handed back to their ranks.
    """
    return x[_rank_order(x, cu_seqlens, size, total)]


def thd_copy_valid_tokens_from_per_split_to_rank_local(
    out: torch.Tensor, of_step: torch.Tensor, cu_seqlens_padded: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    """Copies the rows of a step's segments to the same rows of `out`, in place.

    Called by the all_gather exchange, whose two steps compute the two chunks of each segment.
    """
    for start, length in zip(cu_seqlens_padded.tolist(), cu_seqlens.diff().tolist(), strict=False):
        out[start : start + length] = of_step[start : start + length]


def thd_get_partitioned_indices(cu_seqlens: torch.Tensor, total: int, size: int, rank: int) -> torch.Tensor:
    """The places in the sequence, int32, of the tokens that a rank holds.

    Called by `get_thd_partitioned_indices` (attention/dot_product_attention/context_parallel.py).
    """
    order = _rank_order(torch.arange(total), cu_seqlens, size, total)
    return order.chunk(size)[rank].int()


def _rank_order(x: torch.Tensor, cu_seqlens: torch.Tensor, size: int, total: int) -> torch.Tensor:
    """The place in the sequence of each token of all ranks: rank r holds chunks r and 2 * size - 1 - r of a segment."""
    assert len(x) == total == cu_seqlens[-1], (len(x), total, cu_seqlens)
    chunks = [torch.arange(*bounds).chunk(2 * size) for bounds in cu_seqlens.unfold(0, 2, 1).tolist()]
    assert all(len(chunk) == len(each[0]) for each in chunks for chunk in each), "chunks of different lengths"
    return torch.cat([each[n] for rank in range(size) for each in chunks for n in (rank, 2 * size - 1 - rank)])


def _half(cu_seqlens: torch.Tensor, half: int, total: int) -> torch.Tensor:
    """The rows of all segments' first or second halves."""
    assert (cu_seqlens.dtype, int(cu_seqlens[-1])) == (torch.int32, total)
    bounds = [(start, (start + end) // 2, end) for start, end in cu_seqlens.unfold(0, 2, 1).tolist()]
    assert all(end - middle == middle - start for start, middle, end in bounds), "a segment of odd length"
    return torch.cat([torch.arange(*bound[half : half + 2]) for bound in bounds])
