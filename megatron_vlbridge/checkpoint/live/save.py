"""A Hugging Face folder out of a live, sharded model, written by all ranks."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import batched
from pathlib import Path

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.conversion import Conversion
from megatron_vlbridge.checkpoint.dtypes import as_dtype
from megatron_vlbridge.checkpoint.export_plan import ExportChoices, plan_export_of
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.hf.quantise import weight_region
from megatron_vlbridge.checkpoint.hf.template import find_template
from megatron_vlbridge.checkpoint.hf.writer import SafetensorsWriter
from megatron_vlbridge.checkpoint.live.collectives import gather, raise_on_all_ranks, rank_and_size
from megatron_vlbridge.checkpoint.live.load import check_config
from megatron_vlbridge.checkpoint.live.shards import Model, modules_of
from megatron_vlbridge.checkpoint.live.weights import LiveWeights
from megatron_vlbridge.checkpoint.stream.checksums import write_checksums
from megatron_vlbridge.checkpoint.stream.engine import Block
from megatron_vlbridge.checkpoint.stream.parts import Part
from megatron_vlbridge.checkpoint.stream.staging import staged_folder, sync, write_failure
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import Family, read_config
from megatron_vlbridge.weights import Region

_ORIGIN = {"kind": "save"}


@torch.no_grad()
def save_hf(
    model: Model,
    folder: str | Path,
    like: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    experts: str | None = None,
    max_shard_size: int | None = None,
    portable_config: bool = False,
    fp8: bool = False,
) -> Path:
    """Write a live, sharded model as a Hugging Face checkpoint, and return the new folder.

    The result is, byte by byte, what `export_checkpoint` makes of the model saved by Megatron: names, shards, other
    files and the form of the experts are those of `like`, the Hugging Face folder (or Hub id) that the training started
    from, and the options are the same. All ranks must call it, and see `folder` and `like` in one file system. Each
    writes its share, and holds, beside the model, some 600 MiB at the most. The folder appears under its name when it
    is complete.

    Raises VLBridgeError, on all ranks, and leaves nothing under the new name, when the model does not match `like`,
    the ranks do not hold every weight exactly once, a value does not fit the dtype it is to have (`dtype`, FP8, or that
    of one of several in `like`), a file of `like` is damaged, the target exists or is being written, or the disk is
    full or fails.
    Example: `save_hf(model, "trained", like="Qwen/Qwen3-VL-2B-Instruct")`.
    """
    target, (rank, _) = Path(folder), rank_and_size()
    choices = ExportChoices(dtype, experts, max_shard_size, portable_config, fp8)
    with raise_on_all_ranks():
        if rank == 0:  # a Hub id is fetched once
            find_folder(like)
    with raise_on_all_ranks():
        template = find_template(target, like)
        config = read_config(template.folder)
        for module in modules_of(model):
            check_config(template.folder, config, module)
        family = families.find(config)
        rules = family.table_for(config, template.table, choices.form_to_ask(config, template))
        wanted = as_dtype(dtype)
    weights = LiveWeights(model, rules, wanted, {"folder": str(target), **asdict(choices)})
    with raise_on_all_ranks():
        plan = plan_export_of(weights, target, template, choices)
    _Save(plan, weights, family).run()
    return target


class _Save:
    """One conversion, whose parts the ranks write round-robin."""

    def __init__(self, plan: Conversion, weights: LiveWeights, family: Family) -> None:
        assert isinstance(plan.writer, SafetensorsWriter)
        self.plan, self.writer, self.weights, self.family = plan, plan.writer, weights, family

    def run(self) -> None:
        first = self.weights.rank == 0
        with ExitStack() as stack:
            with raise_on_all_ranks():
                staging = stack.enter_context(staged_folder(self.plan.target, _ORIGIN)) if first else None
                if staging is not None:
                    self.plan.check_space()
                    self.writer.prepare(staging.folder)
            folder = gather(None if staging is None else staging.folder)[0]
            assert folder is not None
            with raise_on_all_ranks():
                if not folder.is_dir():
                    raise VLBridgeError(
                        f"{folder}: expected the folder that rank 0 has made, found none. "
                        "Save to a file system that all ranks share."
                    )
            finished = self._write(folder)
            with raise_on_all_ranks():
                if first:
                    self.writer.finish(folder, finished)
                    self.plan.complete(folder)
                    self.plan.check(folder)
                    write_checksums(folder, finished, _ORIGIN)
            with raise_on_all_ranks():
                stack.close()  # the folder gets its name

    def _write(self, folder: Path) -> list[Part]:
        """All parts, by all ranks. A rank that fails keeps sending, so that the others can finish."""
        block = Block(self.writer.block_bytes, threading.Event())
        done: list[Part] = []
        failure: VLBridgeError | OSError | None = None
        for parts in batched(range(len(self.writer.sizes)), self.weights.size):
            for receiver, index in enumerate(parts):
                self.weights.fetch(self._sources(index), receiver)
            if self.weights.rank < len(parts) and failure is None:
                try:
                    written = self.writer.write(parts[self.weights.rank], folder, block)
                    sync(folder / written.file)
                    done.append(written)
                except (VLBridgeError, OSError) as error:
                    failure = error
            self.weights.release()
        with raise_on_all_ranks():
            if isinstance(failure, VLBridgeError):
                raise failure
            if failure is not None:
                raise VLBridgeError(write_failure(self.plan.target, failure)) from failure
        finished = [part for share in gather(done) for part in share]
        return sorted(finished, key=lambda part: part.index)

    def _sources(self, index: int) -> Iterator[Region]:
        """The regions of the model that a part needs; a tied head is the embedding once more."""
        rules = self.plan.plan.table
        for region in self.writer.regions[index]:
            region = weight_region(region, self.plan.plan.hf)
            if region.name == self.family.head and region.name not in rules.hf_shapes:
                region = Region(self.family.embedding, region.offset, region.shape)
            if region.name in rules.hf_shapes:
                yield from (piece.source for piece in rules.megatron_sources(region))
