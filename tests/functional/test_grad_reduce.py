"""`--grad-reduce-in-bf16`: gradients are summed over micro-batches and ranks in bf16, rounded after each addition."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_vlbridge import load_hf_weights
from megatron_vlbridge.training.batch import read_pack
from megatron_vlbridge.training.step import vlm_step
from tests import reference
from tests.closeness import relative_error
from tests.functional import matrix, ranks
from tests.functional.parity import PACK_LENGTH
from tests.functional.pool import Layout, Pool

Pack = Mapping[str, torch.Tensor]
# One rounding to bf16 moves a value by at most this part of it.
ROUNDING = 2.0**-8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, bool], Path]:
    return matrix.write_folders(tmp_path_factory.mktemp("bf16"), ("dense", "linear-experts"))


def build(layout: Layout, folder: Path, fp32: bool, distributed: bool) -> tuple[list[Any], list[Any]]:
    """This rank's chunks in bf16, and the same in Megatron's wrappers."""
    dtypes = {"params_dtype": torch.bfloat16, "bf16": True, "pipeline_dtype": torch.bfloat16}
    chunks = ranks.build_chunks(layout, folder, load=False, **dtypes)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=fp32, use_distributed_optimizer=distributed, overlap_grad_reduce=False
    )
    wrapped = [DistributedDataParallel(c.config, ddp, Float16Module(c.config, c)) for c in chunks]
    load_hf_weights(wrapped, folder)
    return chunks, wrapped


def of_micro_batches(layout: Layout, folder: Path, packs: Sequence[Pack], distributed: bool) -> dict[str, Any]:
    """A step's gradients: of each micro-batch by autograd, and DDP's buffers before and after they are reduced."""
    (chunk,), (wrapped,) = build(layout, folder, False, distributed)
    found: dict[str, Any] = {}
    buffers = wrapped.buffers + wrapped.expert_parallel_buffers

    def finalize(model: Any, num_tokens: torch.Tensor, **options: Any) -> None:
        found["local"] = {name: p.main_grad.clone() for name, p in chunk.named_parameters()}
        found["before"] = [buffer.grad_data.clone() for buffer in buffers]
        groups = ProcessGroupCollection.use_mpu_process_groups()
        finalize_model_grads(model, num_tokens, **options | {"pg_collection": groups})
        found["tokens"] = int(num_tokens)

    chunk.config.finalize_model_grads_func = finalize
    ranks._run(wrapped, vlm_step, ranks._mine(packs), forward_only=False)
    found["after"] = [buffer.grad_data.clone() for buffer in buffers]
    # The part of each buffer that this rank has whole.
    size, rank = layout.dp, torch.distributed.get_rank()
    found["mine"] = [
        [bucket.grad_data.chunk(size)[rank] if distributed else bucket.grad_data for bucket in buffer.buckets]
        for buffer in buffers
    ]
    found["offsets"] = [
        [bucket.offset + (rank * (len(bucket.grad_data) // size) if distributed else 0) for bucket in buffer.buckets]
        for buffer in buffers
    ]
    (chunk, *_), (wrapped, *_) = build(layout, folder, False, False)
    found["single"] = []
    for pack in ranks._mine(packs):
        wrapped.zero_grad_buffer()
        wrapped(inputs=read_pack(pack, chunk.hf_config)).sum().backward()
        found["single"].append({name: p.main_grad.clone() for name, p in chunk.named_parameters()})
    found["dtypes"] = {name: p.dtype for name, p in chunk.named_parameters()}
    return found


@pytest.mark.parametrize("distributed", [False, True])
def test_sums_are_rounded_to_bf16_after_each_addition(
    pool: Pool, folders: dict[tuple[str, bool, bool], Path], distributed: bool
) -> None:
    """Of micro-batches, one after the other; of ranks; and once more when they are divided by the number of tokens."""
    packs = [reference.pack(group, PACK_LENGTH) for group in matrix.groups()]
    folder = folders["linear-experts", False, False]
    results = pool.run(of_micro_batches, Layout(world=2), folder=folder, packs=packs, distributed=distributed)
    for result in results:
        assert len(result["single"]) == 2
        for name, local in result["local"].items():
            first, second = (single[name] for single in result["single"])
            assert local.dtype == result["dtypes"][name]
            assert torch.equal(local, first + second), name
    assert {torch.bfloat16, torch.float32} == set(results[0]["dtypes"].values())
    tokens = results[0]["tokens"]
    for number, buffers in enumerate(zip(*(r["before"] for r in results), strict=True)):
        summed = buffers[0] + buffers[1]
        expected = (summed.float() * (1 / torch.tensor(float(tokens)))).to(summed.dtype)
        for result in results:
            for offset, part in zip(result["offsets"][number], result["mine"][number], strict=True):
                assert torch.equal(part, expected[offset : offset + len(part)])


def final_gradients(layout: Layout, folder: Path, packs: Sequence[Pack]) -> list[list[Any]]:
    """This rank's shards of a step's gradients, with fp32 and with bf16 sums."""
    found = []
    for fp32 in (True, False):
        chunks, wrapped = build(layout, folder, fp32, False)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunks[0].config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups)
        ranks._run(wrapped, vlm_step, ranks._mine(packs), forward_only=False)
        found.append([shard for chunk in chunks for shard in ranks.gradient_shards(chunk)])
    return found


SMALL = (("dense", Layout(tp=2, sp=True, world=2)),)
LAYOUTS = (
    *(
        (kind, layout)
        for kind in ("dense", "linear-experts")
        for layout in (
            Layout(world=2),
            Layout(cp=2, world=2),
            Layout(pp=2, world=2),
            Layout(pp=2, vpp=2, world=2),
            Layout(tp=2, sp=True, pp=2, cp=2, world=8),
        )
    ),
    ("linear-experts", Layout(tp=2, sp=True, ep=2, etp=1, world=2)),
    ("linear-experts", Layout(ep=2, world=2)),
)


@pytest.mark.parametrize(
    ("kind", "layout"), [*SMALL, *(pytest.param(*row, marks=pytest.mark.layouts) for row in LAYOUTS)], ids=str
)
@pytest.mark.parametrize("tied", [True])
def test_a_layout_is_a_few_roundings_from_sums_in_fp32(
    pool: Pool, folders: dict[tuple[str, bool, bool], Path], kind: str, layout: Layout, tied: bool
) -> None:
    """Four micro-batches and up to eight ranks; the copies on the ranks stay equal to the bit."""
    packs = [reference.pack(group, PACK_LENGTH) for group in matrix.groups()]
    by_rank = pool.run(final_gradients, layout, folder=folders[kind, False, tied], packs=packs)
    fp32, bf16 = (ranks.assemble([rank[index] for rank in by_rank]) for index in (0, 1))
    errors = {name: relative_error(bf16[name].float(), x) for name, x in fp32.items()}
    assert max(errors.values()) < 4 * ROUNDING, sorted(errors.items(), key=lambda item: -item[1])[:5]
    assert sum(error > 0 for error in errors.values()) > len(errors) / 2
    copies: dict[Any, torch.Tensor] = {}
    for key, offset, data in (shard for rank in by_rank for shard in rank[1]):
        assert torch.equal(copies.setdefault((key, offset), data), data), key
