"""Transformer Engine's attention of packs, and its cut of a pack among context-parallel ranks."""

import json
import random
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.backends.cpu import PackedAttention
from megatron_vlbridge.backends.packed import PackedSegments
from megatron_vlbridge.layout.zigzag import zigzag_index
from tests.closeness import relative_error

pytestmark = pytest.mark.gpu

# Query heads, key and value heads, width of a head: the language model's, and the vision towers'.
TEXT, SMALL_TOWER, LARGE_TOWER = (16, 8, 128), (16, 16, 64), (16, 16, 72)
# Several tiles of a kernel and a part of one, and less than one. Time and memory grow with the longest's square.
LENGTHS = [348, 36, 748, 132]
EXCHANGES = ["p2p", "a2a", "all_gather"]
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attention_config(shape: tuple[int, int, int], cp: int = 1) -> TransformerConfig:
    heads, groups, width = shape
    return TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        context_parallel_size=cp,
    )


def random_qkv(shape: tuple[int, int, int], tokens: int) -> QKV:
    heads, groups, width = shape
    seed = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(tokens, count, width, generator=seed) for count in (heads, groups, groups))
    # Exact in bf16, so that all precisions start from the same numbers.
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def attend(
    module: torch.nn.Module, qkv: QKV, mask: AttnMaskType, lengths: list[int], weight: torch.Tensor
) -> list[torch.Tensor]:
    """Output and gradients, on the CPU in fp32."""
    inputs = [x.detach().requires_grad_() for x in qkv]
    packed = PackedSegments.from_lengths(lengths, inputs[0].device)
    output = module(*inputs, attention_mask=None, attn_mask_type=mask, packed_seq_params=packed)
    output = output.view(len(inputs[0]), -1)
    (output.float() * weight.to(output.device)).sum().backward()
    return [x.detach().float().cpu() for x in (output, *(x.grad for x in inputs if x.grad is not None))]


def random_weight(shape: tuple[int, int, int]) -> torch.Tensor:
    """What the output is multiplied with, so that its gradient is not of ones."""
    return torch.randn(sum(LENGTHS), shape[0] * shape[2], generator=torch.Generator().manual_seed(2))


@cache
def reference_of(shape: tuple[int, int, int], mask: AttnMaskType) -> list[torch.Tensor]:
    """The reference attention of `random_qkv` in fp32 on the CPU."""
    module = PackedAttention(attention_config(shape), 1, mask, "self")
    qkv: QKV = tuple(x.float() for x in random_qkv(shape, sum(LENGTHS)))  # type: ignore[assignment]
    return attend(module, qkv, mask, LENGTHS, random_weight(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "mask"),
    [(TEXT, AttnMaskType.causal), (SMALL_TOWER, AttnMaskType.no_mask), (LARGE_TOWER, AttnMaskType.no_mask)],
    ids=["text", "small-tower", "large-tower"],
)
def test_attention_of_a_pack(shape: tuple[int, int, int], mask: AttnMaskType, dtype: torch.dtype) -> None:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    config = attention_config(shape)
    slow = PackedAttention(config, 1, mask, "self")
    fast = TEDotProductAttention(config, 1, mask, "self")
    qkv = random_qkv(shape, sum(LENGTHS))
    weight = random_weight(shape)
    expected = reference_of(shape, mask)
    on_gpu: QKV = tuple(x.to("cuda", dtype) for x in qkv)  # type: ignore[assignment]
    found = attend(fast, on_gpu, mask, LENGTHS, weight)
    torchs = attend(slow, on_gpu, mask, LENGTHS, weight)
    for name, mine, theirs, right in zip(["output", "dq", "dk", "dv"], found, torchs, expected, strict=True):
        error, theirs_error = relative_error(mine, right), relative_error(theirs, right)
        print(f"attention {shape} {mask.name} {dtype} {name}: error {error:.1e}, torch {theirs_error:.1e}")
        assert error < (1e-5 if dtype == torch.float32 else 2 * theirs_error)


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_the_cut_is_transformer_engines(cp_size: int) -> None:
    import transformer_engine_torch

    random.seed(cp_size)
    for _ in range(20):
        segments = tuple(2 * cp_size * random.randint(1, 40) for _ in range(random.randint(1, 12)))
        bounds = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device="cuda")
        for rank in range(cp_size):
            expected = transformer_engine_torch.thd_get_partitioned_indices(bounds, sum(segments), cp_size, rank)
            assert torch.equal(zigzag_index(segments, cp_size, rank), expected.long().cpu())


@pytest.fixture(scope="module")
def over_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """For each exchange the errors of the ranks' outputs and gradients, divided by those of torch's attention.

    One pair of processes runs all exchanges.
    """
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_context_parallel_rank, (folder,), nprocs=2)
    of_ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {exchange: [error for errors in of_ranks for error in errors[exchange]] for exchange in EXCHANGES}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_attention_over_two_ranks(over_two_ranks: dict[str, list[float]], exchange: str) -> None:
    errors = over_two_ranks[exchange]
    print(f"attention over two ranks, {exchange}: {', '.join(f'{error:.2f}' for error in errors)} of torch's error")
    assert all(error < 2 for error in errors)


def _context_parallel_rank(rank: int, folder: Path) -> None:
    """In bf16: Transformer Engine has no context parallelism in fp32."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    mask = AttnMaskType.causal
    slow = PackedAttention(attention_config(TEXT), 1, mask, "self")
    qkv = random_qkv(TEXT, sum(LENGTHS))
    weight = random_weight(TEXT)
    mine = zigzag_index(tuple(LENGTHS), 2, rank)
    expected = [x[mine] for x in reference_of(TEXT, mask)]
    whole: QKV = tuple(x.cuda() for x in qkv)  # type: ignore[assignment]
    torchs = [x[mine] for x in attend(slow, whole, mask, LENGTHS, weight)]
    part: QKV = tuple(x[mine].cuda() for x in qkv)  # type: ignore[assignment]
    errors = {}
    for exchange in EXCHANGES:
        found = attend(exchanging(exchange), part, mask, LENGTHS, weight[mine])
        errors[exchange] = [
            relative_error(one, right) / relative_error(theirs, right)
            for one, theirs, right in zip(found, torchs, expected, strict=True)
        ]
    (folder / f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


def exchanging(exchange: str) -> torch.nn.Module:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention(
        attention_config(TEXT, cp=2),
        1,
        AttnMaskType.causal,
        "self",
        cp_comm_type=exchange,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
