"""What runs inside the workers of `test_weight_sync.py`: exports for inference servers, and ranks that stop in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_vlbridge.checkpoint.live import WeightDigests, export_hf_weights, hf_weight_specs, save_hf
from megatron_vlbridge.errors import VLBridgeError
from tests.functional import ranks
from tests.functional.live_ranks import BIG, MODES, TINY, VOCABULARY, Named
from tests.functional.pool import Layout

Spec = tuple[str, tuple[int, ...], torch.dtype]


def export_all(layout: Layout, folder: Path, options: list[dict[str, Any]]) -> list[tuple[Named, list[Spec]]]:
    """With each of the options what is exported, and what the specs say of it."""
    chunks = ranks.build_chunks(layout, folder, vocab_size=VOCABULARY)
    return [
        (
            list(export_hf_weights(chunks, bucket_bytes=TINY, **chosen)),
            [(name, spec.shape, spec.dtype) for name, spec in hf_weight_specs(chunks[0].hf_config, **chosen).items()],
        )
        for chosen in options
    ]


def export_fp8(layout: Layout, folder: Path) -> dict[str, Named]:
    """In all modes, twice to all."""
    chunks = ranks.build_chunks(layout, folder, vocab_size=VOCABULARY)
    weights = {mode: list(export_hf_weights(chunks, bucket_bytes=TINY, ranks=mode, fp8=True)) for mode in MODES}
    return weights | {"again": list(export_hf_weights(chunks, bucket_bytes=BIG, fp8=True))}


def save(layout: Layout, folder: Path, target: Path, **options: Any) -> Path:
    chunks = ranks.build_chunks(layout, folder, vocab_size=VOCABULARY)
    return save_hf(chunks, target, folder, **options)


def stop(layout: Layout, folder: Path, mode: Any, who: list[int], after: int, by: str) -> str:
    """What this rank is told where some stop after so many tensors, by an error of theirs or by asking for no more."""
    rank = torch.distributed.get_rank()
    chunks = ranks.build_chunks(layout, folder)
    told = "all"
    try:
        for number, _ in enumerate(export_hf_weights(chunks, bucket_bytes=TINY, ranks=mode)):
            if rank in who and number == after:
                if by == "error":
                    raise RuntimeError("the engine is gone")
                told = "stopped"
                break
    except (VLBridgeError, RuntimeError) as error:
        told = str(error)
    torch.distributed.barrier()  # all are here, and their next collective is the same
    return told


def refusals(layout: Layout, folder: Path, cases: Mapping[str, list[dict[str, Any]]], target: Path) -> dict[str, str]:
    """In each case what this rank is told where it exports, or in those called "save ..." saves, with its options.

    `value` is not an option: the last rank has it in a linear layer, and NaN in a norm, which is not quantised.
    """
    rank = torch.distributed.get_rank()
    chunks = ranks.build_chunks(layout, folder)
    parameters = {name: x.data for name, x in chunks[-1].language_model.named_parameters()}
    linear = next(x for name, x in parameters.items() if name.endswith("mlp.linear_fc2.weight"))
    if rank == layout.world - 1:
        next(x for name, x in parameters.items() if name.endswith("final_layernorm.weight"))[0] = torch.nan
    told = {}
    for case, per_rank in cases.items():
        options = dict(per_rank[rank])
        value = options.pop("value", 1.0)
        linear.view(-1)[5] = value if rank == layout.world - 1 else 1.0
        try:
            if case.startswith("save"):
                save_hf(chunks, target, folder, **options)
            else:
                list(export_hf_weights(chunks, bucket_bytes=TINY, **options))
            told[case] = "accepted"
        except VLBridgeError as error:
            told[case] = str(error)
    return told


def export_changes(layout: Layout, folder: Path, mode: Any) -> list[tuple[list[str], tuple[str, ...], bool]]:
    """Of exports with the same digests: names, what is left out, and whether it is what a full export has.

    Nothing is changed before the second; then a value of one layer, on one rank, and one of a norm on another; other
    options; a run in which the first rank stops early; the same again.
    """
    rank = torch.distributed.get_rank()
    chunks, digests = ranks.build_chunks(layout, folder, vocab_size=VOCABULARY), WeightDigests()
    results = []

    def export(most: int = 10**9, **options: Any) -> None:
        everything = dict(export_hf_weights(chunks, **options))
        found = {}
        try:
            # Not islice: this asks for one more.
            for name, x in export_hf_weights(chunks, ranks=mode, bucket_bytes=TINY, digests=digests, **options):
                found[name] = x
                if len(found) == most:
                    break
        except VLBridgeError:
            assert rank != 0
        same = all(torch.equal(bits(x), bits(everything[name])) for name, x in found.items())
        results.append((list(found), digests.unchanged, same))

    export()
    export()
    change(chunks, "mlp.linear_fc2.weight", 0)
    change(chunks, "final_layernorm.weight", layout.world // 2)
    export()
    export(dtype="bfloat16")
    export(5 if rank == 0 else 10**9)
    export()
    export()
    return results


def change(chunks: list[Any], end: str, by: int) -> None:
    """Flip the sign of a value of the first decoder parameter whose name ends so."""
    if torch.distributed.get_rank() == by:
        found = (x for chunk in chunks for name, x in chunk.language_model.named_parameters() if name.endswith(end))
        next(found).data.view(-1)[3].neg_()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)
