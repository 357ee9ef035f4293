"""Unusual values in config.json: each gives transformers' logits, loss and gradients, with the smallest of models."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.nn.functional import pad

from megatron_vlbridge import read_config
from tests import mtp_reference, reference
from tests.functional.parity import measure
from tests.functional.pool import Layout, Pool


class Case(NamedTuple):
    """Fields of a config that differ from those of `reference.write_checkpoint`.

    With experts and with linear attention where these have some.
    """

    text: Mapping[str, Any] = {}
    vision: Mapping[str, Any] = {}
    experts: Mapping[str, Any] | None = None
    linear: Mapping[str, Any] | None = None
    tied: bool = False


def rope(*section: int, theta: float = 5e6) -> dict[str, Any]:
    """Rotary parameters with this `mrope_section`."""
    values = {"rope_type": "default", "rope_theta": theta, "mrope_section": section, "mrope_interleaved": True}
    return {"rope_parameters": values}


# Of three layers the first and the last have linear attention.
EVERY_SECOND = {"full_attention_interval": 2}

CASES: dict[str, Case] = {
    "deepstack unsorted": Case(vision={"depth": 3, "deepstack_visual_indexes": [2, 0, 1]}),
    "deepstack of every layer": Case(vision={"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}),
    "no deepstack, one position": Case(vision={"deepstack_visual_indexes": [], "num_position_embeddings": 1}),
    "one layer each": Case(text={"num_hidden_layers": 1}, vision={"depth": 1, "deepstack_visual_indexes": [0]}),
    "height past the end, merge 1": Case(text=rope(1, 4, 3), vision={"spatial_merge_size": 1}),
    "width past the end, merge 3": Case(text=rope(2, 2, 4), vision={"spatial_merge_size": 3}),
    "time alone": Case(text=rope(8, 0, 0, theta=100.0), vision={"num_position_embeddings": 4}),
    "width alone": Case(text=rope(0, 0, 8, theta=1.5), vision={"num_position_embeddings": 169}),
    "height alone": Case(text=rope(0, 8, 0), vision={"temporal_patch_size": 1, "in_channels": 1, "patch_size": 5}),
    "many kv heads": Case(
        text={"num_key_value_heads": 4}, vision={"temporal_patch_size": 3, "in_channels": 4, "patch_size": 1}
    ),
    "one kv head": Case(text={"num_key_value_heads": 1, "rms_norm_eps": 0.3}, vision={"num_heads": 8}),
    "one head": Case(text={"num_attention_heads": 1, "num_key_value_heads": 1}, vision={"num_heads": 1}),
    "seven heads": Case(text={"num_attention_heads": 7, "num_key_value_heads": 7, "max_position_embeddings": 3}),
    "six heads of 24": Case(
        text={"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 24, **rope(4, 4, 4)},
    ),
    "odd sizes": Case(
        text={"hidden_size": 45, "intermediate_size": 37, "vocab_size": 121, "head_dim": 10, **rope(2, 1, 2)},
        vision={"out_hidden_size": 45, "intermediate_size": 41, "hidden_size": 36, "num_heads": 3},
    ),
    "odd sizes tied": Case(
        text={"hidden_size": 45, "vocab_size": 121, "sliding_window": 3, "use_sliding_window": False},
        vision={"out_hidden_size": 45},
        tied=True,
    ),
    "pad token in the text": Case(text={"pad_token_id": 24}),
    "pad token in the text, tied": Case(text={"pad_token_id": -104}, tied=True),
    "all experts": Case(experts={"num_experts_per_tok": 4, "head_dim": 8, "num_key_value_heads": 1, **rope(2, 1, 1)}),
    "three of five experts": Case(experts={"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12}),
    "dense layers unsorted": Case(experts={"num_hidden_layers": 4, "mlp_only_layers": [3, 1, 3]}),
    "every second layer but one": Case(
        experts={"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
    ),
    "no layer with experts": Case(experts={"decoder_sparse_step": 5}),
    "full attention first": Case(linear={"layer_types": ["full_attention", "linear_attention", "linear_attention"]}),
    "a key head for each value head": Case(
        linear={**EVERY_SECOND, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 8}
    ),
    "three value heads for a key head, wider convolution": Case(
        linear={**EVERY_SECOND, "linear_num_value_heads": 12, "linear_conv_kernel_dim": 6}
    ),
    "one key head, convolution of one": Case(
        linear={**EVERY_SECOND, "linear_num_key_heads": 1, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 1}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_unusual_config_equals_transformers(pool: Pool, tmp_path: Path, name: str) -> None:
    folder, conversations = make(tmp_path, CASES[name])
    measure(pool, Layout(), folder, [conversations]).check()


def make(folder: Path, case: Case) -> tuple[Path, list[reference.Conversation]]:
    """A checkpoint of this case with three decoder layers, and conversations for it whose every token is a label."""
    options: dict[str, Any] = {"text_fields": case.text, "vision_fields": case.vision, "tied": case.tied}
    reference.write_checkpoint(folder, layers=3, experts=case.experts, linear=case.linear, **options)
    vision = read_config(folder).vision
    sizes = {"merge_size": vision.spatial_merge_size, "patch_dim": vision.patch_dim}
    conversations = [reference.conversation(kind, seed, **sizes) for seed, kind in enumerate(("mixed", "images"), 1)]
    # Also after placeholders: without, the features that are added after the last layer would reach no loss.
    return folder, [replace(c, labels=pad(c.tokens[1:], (0, 1), value=-100)) for c in conversations]


RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
# Deepstack features of three levels cross stages, are recomputed, and are cut by sequence and context parallelism.
SPREAD = {
    # The second stage takes the features of two levels.
    "stages": (Layout(tp=2, sp=True, pp=2, stages="Et|tttL", world=4), {}),
    "context parallel, recomputed": (Layout(cp=2, world=2), RECOMPUTED),
}


@pytest.mark.parametrize("name", SPREAD)
def test_unsorted_deepstack_on_several_ranks(pool: Pool, tmp_path: Path, name: str) -> None:
    layout, options = SPREAD[name]
    folder, conversations = make(tmp_path, CASES["deepstack unsorted"]._replace(text={"num_hidden_layers": 4}))
    measure(pool, layout, folder, [conversations, conversations[::-1]], **options).check()


def test_the_pad_token_of_an_mtp_layer(pool: Pool, tmp_path: Path) -> None:
    """Also as the next token, whose embedding the stage of the MTP layer takes."""
    folder, conversations = make(tmp_path, Case(text={"num_hidden_layers": 4, "pad_token_id": 24}))
    mtp_reference.add_prediction_layer(folder)
    groups = [conversations, conversations[::-1]]
    measure(pool, Layout(tp=2, sp=True, pp=2, world=4), folder, groups).check()
