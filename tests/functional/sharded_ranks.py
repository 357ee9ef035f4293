"""What runs inside the workers where each rank is given its own part of a packed row, and no more."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.step import token_loss
from tests.functional import ranks
from tests.functional.pool import Layout

Row = Mapping[str, torch.Tensor]


def row_step(iterator: Any, model: torch.nn.Module) -> Any:
    """The forward step of a framework that cuts the rows itself."""
    row = mine({key: value[0] for key, value in next(iterator).items()})
    return model(**row), partial(token_loss, (row["labels"] != -100).float())


def pixels_for_the_tower(iterator: Any, model: torch.nn.Module, step: Any, others: str) -> Any:
    """`step`, where the stages without the tower get no pixels (`others`: none), or such as cannot be moved (meta)."""
    batch = next(iterator)
    if not get_attr_wrapped_model(model, "pre_process"):
        pixels = {key: batch[key].to("meta") for key in ("pixel_values", "pixel_values_videos")}
        rest = {key: value for key, value in batch.items() if key not in pixels}
        batch = rest | (pixels if others == "meta" else {})
    return step(iter([batch]), model)


def mine(row: Row) -> dict[str, torch.Tensor]:
    """This rank's row: `input_ids` and `labels` `[cp, T]` hold one row for each context-parallel rank."""
    rank = parallel_state.get_context_parallel_rank()
    return {key: value[rank : rank + 1] if key in ("input_ids", "labels") else value for key, value in row.items()}


def logits_of_each_form(layout: Layout, folder: Path, parts: Row, whole: torch.Tensor) -> list[torch.Tensor]:
    """This rank's logits from its part of the row, from the whole row, and from its part with Megatron's parameters."""
    model = ranks.build_model(layout, folder)
    part = mine(parts)
    bounds, lengths = part.pop("cu_seqlens"), part.pop("lengths")
    part.pop("labels")
    params = PackedSeqParams(
        cu_seqlens_q=torch.cat((bounds[:1], lengths.cumsum(0))).int(), cu_seqlens_q_padded=bounds.int()
    )
    with torch.no_grad():
        return [
            model(**part, cu_seqlens=bounds, lengths=lengths),
            model(**(part | {"input_ids": whole}), cu_seqlens=bounds, lengths=lengths),
            model(**part, packed_seq_params=params),
        ]


def answers(
    layout: Layout, folder: Path, rows: Sequence[Row], faults: Sequence[Mapping[str, Any]], **options: Any
) -> list[str | int]:
    """Of each row this rank's error or the rows of its logits; the last context-parallel rank has the faults."""
    model = ranks.build_model(layout, folder, load=False, **options)
    last = parallel_state.get_context_parallel_world_size() - 1
    found: list[str | int] = []
    for row, fault in zip(rows, faults, strict=True):
        given = mine(row) | (dict(fault) if parallel_state.get_context_parallel_rank() == last else {})
        given.pop("labels")
        try:
            found.append(model(**given).shape[1])
        except VLBridgeError as error:
            found.append(str(error))
    return found
