"""What runs inside the workers: weights into and out of live models, and calls that are to be refused."""

import argparse
import errno
import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.training.global_vars import set_args
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlbridge.checkpoint.live import export_hf_weights, load_hf_weights, save_hf
from megatron_vlbridge.checkpoint.live.collectives import raise_on_all_ranks
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import ExpertForm
from megatron_vlbridge.training.batch import read_pack
from megatron_vlbridge.training.pretrain import model_provider
from tests.functional import ranks
from tests.functional.pool import Layout

VOCABULARY = 192  # more rows than the checkpoint's, as Megatron pads them
TINY, BIG = 20_000, 2**30
MODES: tuple[Literal["all", "first", "shared"], ...] = ("all", "first", "shared")

Named = list[tuple[str, torch.Tensor]]


def export_in_all_modes(layout: Layout, folder: Path, experts: ExpertForm | None) -> dict[tuple[str, int], Named]:
    chunks = ranks.build_chunks(layout, folder, vocab_size=VOCABULARY)
    return {
        (mode, size): list(export_hf_weights(chunks, bucket_bytes=size, ranks=mode, experts=experts))
        for mode in MODES
        for size in (TINY, BIG)
    }


def random_mtp(layout: Layout, folder: Path) -> list[ranks.Shard]:
    """The weights after a load that leaves the MTP layer as it was built."""
    torch.manual_seed(5)
    chunks = ranks.build_chunks(layout, folder, load=False)
    load_hf_weights(chunks, folder, random_mtp=True)
    return [shard for chunk in chunks for shard in ranks.weight_shards(chunk)]


def export_without(layout: Layout, folder: Path, ignore: list[str]) -> Named:
    """Of a model that was filled from a folder which holds further tensors."""
    chunks = ranks.build_chunks(layout, folder, vocab_size=VOCABULARY, load=False)
    load_hf_weights(chunks, folder, ignore=ignore)
    return list(export_hf_weights(chunks))


def export_bfloat16(layout: Layout, folder: Path) -> dict[str, Named]:
    """Of a model in bfloat16 as it is, and of one in float32 that is converted."""
    half, full = (ranks.build_chunks(layout, folder, vocab_size=VOCABULARY, load=False) for _ in range(2))
    for chunk in half:
        chunk.config.bf16 = True
    load_hf_weights([Float16Module(chunk.config, chunk) for chunk in half], folder)
    load_hf_weights(full, folder)
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in full]
    return {
        "half": list(export_hf_weights(half)),
        "converted": list(export_hf_weights(wrapped, bucket_bytes=TINY, dtype="bfloat16")),
        "float16": list(export_hf_weights(full, bucket_bytes=TINY, dtype="float16")),
    }


def export_half(layout: Layout, folder: Path) -> Named:
    """Of a model in bfloat16."""
    chunks = [chunk.bfloat16() for chunk in ranks.build_chunks(layout, folder, vocab_size=VOCABULARY, load=False)]
    load_hf_weights(chunks, folder)
    return list(export_hf_weights(chunks))


def export_forms(layout: Layout, folder: Path, form: ExpertForm) -> dict[str, Named]:
    """In the form that is the default, in the folder's own, and in that form with the tensors shared out."""
    chunks = ranks.build_chunks(layout, folder, vocab_size=VOCABULARY)
    return {
        "default": list(export_hf_weights(chunks, bucket_bytes=TINY)),
        "own": list(export_hf_weights(chunks, experts=form)),
        "shared": list(export_hf_weights(chunks, bucket_bytes=TINY, ranks="shared", experts=form)),
    }


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The bytes of each read of values, without those of headers."""
    counts, preadv = [], os.preadv

    def counting(*arguments: Any) -> int:
        counts.append(preadv(*arguments))
        return counts[-1]

    os.preadv = counting
    try:
        yield counts
    finally:
        os.preadv = preadv


def count_bytes_read(layout: Layout, folder: Path, turned: bool) -> dict[str, int]:
    """What this rank reads, what it holds, and that with what lies between columns in the file.

    `turned` says that the file has the experts' rows as columns.
    """
    chunks = ranks.build_chunks(layout, folder, load=False)
    with counted_reads() as counts:
        load_hf_weights(chunks, folder)
    held = expected = 0
    for shard in (x for chunk in chunks for x in sharded_tensors(chunk)):
        shape, whole = shard.local_shape, shard.global_shape[shard.prepend_axis_num :]
        rows, columns, width = shape[0], math.prod(shape[1:]), math.prod(whole[1:])
        if turned and ".experts." in shard.key:
            rows, columns, width = columns, rows, whole[0]
        held += 4 * rows * columns
        expected += 4 * ((rows - 1) * width + columns)
    return {"read": sum(counts), "held": held, "expected": expected}


def sharded_tensors(chunk: Any) -> list[ShardedTensor]:
    """What a module says that it holds."""
    built = [x.build() if isinstance(x, ShardedTensorFactory) else x for x in chunk.sharded_state_dict().values()]
    groups = [x if isinstance(x, list) else list(x.values()) if isinstance(x, dict) else [x] for x in built]
    return [x for group in groups for x in group if isinstance(x, ShardedTensor)]


def export_provided(layout: Layout, folder: Path) -> Named:
    """Of the chunks that `pretrain` would build with `--hf-weights`, one call for each."""
    (config, *_) = (chunk.config for chunk in ranks.build_chunks(layout, folder, load=False))
    arguments = {"hf_folder": folder, "hf_weights": True, "load": None, "padded_vocab_size": VOCABULARY}
    arguments |= {
        "allow_unverified": [],
        "freeze": [],
        "check_position_ids": False,
        "no_vision_balance": False,
        "seq_length": 128,
        "random_mtp": False,
        "lora_rank": None,
        "lora_base": None,
    }
    set_args(argparse.Namespace(virtual_pipeline_model_parallel_size=layout.vpp, **arguments))
    try:
        chunks = [
            model_provider(
                parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
                parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
                vp_stage=number,
                config=config,
            )
            for number in range(layout.vpp)
        ]
    finally:
        set_args(None)
    return list(export_hf_weights(chunks))


class Peak(TorchDispatchMode):
    """The most bytes of tensors made inside it that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in known:
            storage = result.untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result


def measure_peaks(layout: Layout, folder: Path, limit: int) -> dict[str, int]:
    """In each mode, the most bytes that this rank holds besides the model."""
    chunks = ranks.build_chunks(layout, folder, vocab_size=VOCABULARY)
    peaks = {}
    for mode in MODES:
        weights = export_hf_weights(chunks, bucket_bytes=limit, ranks=mode)
        with Peak() as peak:
            for _ in weights:
                pass
        peaks[mode] = peak.bytes
    return peaks


def train_and_export(layout: Layout, folder: Path, pack: dict[str, torch.Tensor], overlap: bool) -> Named:
    """One step of the distributed optimizer, whose ranks hand out the new weights at once or only when needed."""
    (chunk,) = ranks.build_chunks(layout, folder)
    ddp = DistributedDataParallelConfig(
        overlap_grad_reduce=overlap, overlap_param_gather=overlap, use_distributed_optimizer=True
    )
    model = DistributedDataParallel(chunk.config, ddp, chunk)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=True, clip_grad=0.0), [model]
    )
    model(inputs=read_pack({key: value[None] for key, value in pack.items()}, chunk.hf_config)).sum().backward()
    model.finish_grad_sync()
    optimizer.step()
    return list(export_hf_weights(model))


def save(layout: Layout, folder: Path, target: Path, like: Path | None = None, **options: Any) -> Path:
    """Load the weights of `folder` and save them."""
    return save_hf(ranks.build_chunks(layout, folder, vocab_size=VOCABULARY), target, like or folder, **options)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """A disk that is soon full, as far as this process sees it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def unreadable() -> Iterator[None]:
    """A disk that fails when numbers are read."""

    def failing(*_arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    preadv, os.preadv = os.preadv, failing
    try:
        yield
    finally:
        os.preadv = preadv


def hold_the_first_experts(chunk: Any) -> None:
    """Let a module say that its experts are those of the first expert-parallel rank."""
    describe = chunk.base_sharded_state_dict

    def wrong() -> list[ShardedTensor]:
        built = [x.build() if isinstance(x, ShardedTensorFactory) else x for x in describe().values()]
        tensors = [x for group in built for x in (group if isinstance(group, list) else [group])]
        return [
            replace(x, global_offset=(x.global_offset[0], x.global_offset[1] % 2, *x.global_offset[2:]))
            if ".experts.experts." in getattr(x, "key", "")
            else x
            for x in tensors
        ]

    chunk.base_sharded_state_dict = wrong


def refusal(layout: Layout, folder: Path, what: str, target: Path, others: Path) -> str:
    """What this rank is told."""
    rank = torch.distributed.get_rank()
    chunks = ranks.build_chunks(layout, folder, load=what == "save what no longer fits")
    if "experts" in what:
        hold_the_first_experts(chunks[0])
    if "too large" in what and rank == 1:
        next(chunks[0].parameters()).data.view(-1)[0] = torch.finfo(torch.float32).max
    broken = files_of_at_most(1000) if what == "save to a full disk" and rank == 1 else nullcontext()
    if "cannot be read" in what:
        broken = unreadable()
    calls: dict[str, Callable[[], object]] = {
        "load lost experts": lambda: load_hf_weights(chunks, folder),
        "load a chunk of two": lambda: load_hf_weights(chunks[rank:], folder),
        "load where a rank has no folder": lambda: load_hf_weights(chunks, folder if rank else target),
        "export lost experts": lambda: list(export_hf_weights(chunks)),
        "export a chunk of two": lambda: list(export_hf_weights(chunks[: 2 - rank], ranks="first")),
        "export differently": lambda: list(export_hf_weights(chunks, bucket_bytes=1000 + rank)),
        "export to nobody": lambda: list(export_hf_weights(chunks, ranks="nobody")),  # type: ignore[arg-type]
        "export in no bytes": lambda: list(export_hf_weights(chunks, bucket_bytes=0)),
        "export as integers": lambda: list(export_hf_weights(chunks, dtype="int8")),
        "save to a full disk": lambda: save_hf(chunks, target, folder),
        "save over something": lambda: save_hf(chunks, folder, folder),
        "save like another model": lambda: save_hf(chunks, target, others),
        "save what no longer fits": lambda: save_hf(chunks, target, others),
        "save beside what cannot be read": lambda: save_hf(chunks, target, others),
        "save as float16 what is too large": lambda: save_hf(chunks, target, folder, dtype="float16"),
        "export as float16 what is too large": lambda: list(export_hf_weights(chunks, ranks="shared", dtype="float16")),
        "export as bfloat16 what is too large": lambda: list(export_hf_weights(chunks, dtype="bfloat16")),
        "load as bfloat16 what is too large": lambda: load_hf_weights([chunk.bfloat16() for chunk in chunks], others),
        "load as float16 what is too large": lambda: load_hf_weights([chunk.half() for chunk in chunks], others),
    }
    try:
        with broken:
            calls[what]()
    except VLBridgeError as error:
        return str(error)
    return "accepted"


def out_of_memory(layout: Layout, kind: type[Exception]) -> str:
    """What is raised where the last rank has too little memory."""
    try:
        with raise_on_all_ranks():
            if torch.distributed.get_rank() == layout.world - 1:
                raise kind("expert 7")
    except (VLBridgeError, kind) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
