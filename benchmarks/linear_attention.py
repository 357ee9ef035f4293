"""The gated delta rule of the CPU backend over packs, compared with transformers' chunked rule.

    python benchmarks/linear_attention.py

transformers' rule has no packs and is called once per segment. Both run on one thread, in turn, forward and backward,
with 4 heads of 64 dims. Prints the medians and their ratio for packs of segments of one length and of mixed lengths,
then the memory that the forward keeps for the backward; exit code 1 if ours is slower than transformers' by more than
5 % anywhere, or if four times the tokens keep more than 4.4 times the memory.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from megatron_vlbridge.backends.delta_rule import chunk_gated_delta_rule

HEADS, DIM = 4, 64
PACKS = {
    "1 x 4096": [4096],
    "8 x 512": [512] * 8,
    "64 x 64": [64] * 64,
    "mixed": [1, 2, 3, 1500, 63, 64, 65, 700, 10, 900, 128, 300, 360],
}
ROUNDS = 9
LARGEST_RATIO, LARGEST_GROWTH = 1.05, 4.4


def make_inputs(tokens: int) -> list[Tensor]:
    """q, k, v, log decay and beta, as a layer would pass them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, DIM, generator=generator) for _ in range(3))
    g, beta = (torch.rand(1, tokens, HEADS, generator=generator) for _ in range(2))
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
    return [x.requires_grad_() for x in (*unit, v, -0.1 * g, beta)]


def ours(inputs: Sequence[Tensor], lengths: list[int]) -> Tensor:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return chunk_gated_delta_rule(*inputs, cu_seqlens=cu_seqlens)[0]


def theirs(inputs: Sequence[Tensor], lengths: list[int]) -> Tensor:
    segments = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    return torch.cat([torch_chunk_gated_delta_rule(*segment)[0] for segment in segments], dim=1)


def step(rule: Callable[..., Tensor], lengths: list[int], backward: bool) -> Callable[[], None]:
    inputs = make_inputs(sum(lengths))

    def run() -> None:
        out = rule(inputs, lengths)
        if backward:
            torch.autograd.grad(out.sum(), inputs)

    return run


def medians_ms(*calls: Callable[[], None]) -> list[float]:
    """Of calls made in turn, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, seconds in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) * 1e3 for seconds in times]


def kept_bytes(tokens: int) -> int:
    """What the forward keeps for the backward, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = make_inputs(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = ours(inputs, [tokens])  # alive, so that no storage is freed and its address given again
    assert out.requires_grad
    return sum(storages.values())


def main() -> int:
    torch.set_num_threads(1)
    worst = 0.0
    for name, lengths in PACKS.items():
        for backward in (False, True):
            reference, packed = medians_ms(step(theirs, lengths, backward), step(ours, lengths, backward))
            worst = max(worst, packed / reference)
            what = "forward and backward" if backward else "forward"
            print(f"{name:9} {what:21} transformers {reference:7.1f} ms   ours {packed:7.1f} ms", end="   ")
            print(f"ours / transformers {packed / reference:.2f}")
    kept = {tokens: kept_bytes(tokens) for tokens in (4096, 8192, 16384)}
    print("kept for backward:", ", ".join(f"{tokens} tokens {size / 2**20:.0f} MiB" for tokens, size in kept.items()))
    growth = kept[16384] / kept[4096]
    print(
        f"16384 tokens keep {growth:.2f} times what 4096 do; median of {ROUNDS}, one thread, torch {torch.__version__}"
    )
    return 0 if worst <= LARGEST_RATIO and growth <= LARGEST_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
