"""Transformer Engine's attention of packs, and its cut of a pack among context-parallel ranks."""

import random
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
LENGTHS = [700, 36, 1500, 260]
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


def reference_of(module: PackedAttention, qkv: QKV, mask: AttnMaskType, weight: torch.Tensor) -> list[torch.Tensor]:
    """The reference attention in fp32 on the CPU."""
    return attend(module, tuple(x.float().cpu() for x in qkv), mask, LENGTHS, weight)  # type: ignore[arg-type]


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
    weight = torch.randn(sum(LENGTHS), shape[0] * shape[2], generator=torch.Generator().manual_seed(2))
    expected = reference_of(slow, qkv, mask, weight)
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("exchange", ["p2p", "a2a", "all_gather"])
def test_attention_over_two_ranks(exchange: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_context_parallel_rank, (str(tmp_path / "store"), exchange), nprocs=2)


def _context_parallel_rank(rank: int, store: str, exchange: str) -> None:
    """In bf16: Transformer Engine has no context parallelism in fp32."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    mask = AttnMaskType.causal
    fast = TEDotProductAttention(
        attention_config(TEXT, cp=2),
        1,
        mask,
        "self",
        cp_comm_type=exchange,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    slow = PackedAttention(attention_config(TEXT), 1, mask, "self")
    qkv = random_qkv(TEXT, sum(LENGTHS))
    weight = torch.randn(sum(LENGTHS), TEXT[0] * TEXT[2], generator=torch.Generator().manual_seed(2))
    mine = zigzag_index(tuple(LENGTHS), 2, rank)
    expected = [x[mine] for x in reference_of(slow, qkv, mask, weight)]
    whole: QKV = tuple(x.cuda() for x in qkv)  # type: ignore[assignment]
    torchs = [x[mine] for x in attend(slow, whole, mask, LENGTHS, weight)]
    part: QKV = tuple(x[mine].cuda() for x in qkv)  # type: ignore[assignment]
    found = attend(fast, part, mask, LENGTHS, weight[mine])
    for one, theirs, right in zip(found, torchs, expected, strict=True):
        assert relative_error(one, right) < 2 * relative_error(theirs, right)
    dist.destroy_process_group()
