"""What runs inside the workers where a batch comes with its positions."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.pretrain import model_provider
from megatron_vlbridge.training.step import token_loss, vlm_step
from tests.functional import ranks, sharded_ranks
from tests.functional.pool import Layout
from tests.functional.test_arguments import COMPLETE
from tests.functional.test_own_script import parsed


def row_step(iterator: Any, model: torch.nn.Module) -> Any:
    """`sharded_ranks.row_step` with this rank's `position_ids`, of which the rows hold one for each rank."""
    row = {key: value[0] for key, value in next(iterator).items()}
    part = sharded_ranks.mine({key: value for key, value in row.items() if key != "position_ids"})
    if "position_ids" in row:
        part["position_ids"] = row["position_ids"][parallel_state.get_context_parallel_rank()]
    mask = (part["labels"] != -100).float()
    if not get_attr_wrapped_model(model, "post_process"):
        part["labels"] = None
    return model(**part), partial(token_loss, mask)


def answers(
    layout: Layout, folder: Path, calls: Sequence[Sequence[Mapping[str, Any]]], **options: Any
) -> list[str | torch.Tensor]:
    """Of each call this rank's error or logits; a call holds the arguments of each context-parallel rank.

    With `check` the given positions are compared; with `pack` alone this is read by `vlm_step`.
    """
    model = ranks.build_model(layout, folder, **options)
    found: list[str | torch.Tensor] = []
    for call in calls:
        given = dict(call[parallel_state.get_context_parallel_rank()])
        model.check_position_ids = given.pop("check", False)
        try:
            with torch.no_grad():
                output = vlm_step(iter([given["pack"]]), model)[0] if "pack" in given else model(**given)
            found.append(output)
        except VLBridgeError as error:
            found.append(str(error))
    return found


def provided(layout: Layout, folder: Path, words: Sequence[str]) -> bool:
    """Whether the model that `pretrain` builds with these arguments compares positions."""
    with parsed(layout, [*COMPLETE, "--hf-folder", folder, *words]):
        return model_provider().check_position_ids
