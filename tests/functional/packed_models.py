"""Packs and their conversations one by one through tiny models of transformers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlbridge.integrations import as_transformers_batch
from tests import reference
from tests.closeness import FP32, assert_close_in_norm
from tests.reference import Conversation, conversation, text

# A conversation, and the seconds per temporal patch of each of its videos, where the model takes them.
type Sample = tuple[Conversation, list[float]]

# For each model, options of `reference.write_checkpoint`.
WINDOWS: dict[str, Any] = {
    "classes": "Qwen2_5_VL",
    "text_fields": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "vision_fields": {"window_size": 16, "fullatt_block_indexes": [1, 3], "tokens_per_second": 3},
}
KINDS: dict[str, dict[str, Any]] = {"qwen2_5_vl": WINDOWS, "qwen3_vl": {}, "qwen3_vl_moe": {"experts": {}}}
LINEAR: dict[str, dict[str, Any]] = {"qwen3_5": {"linear": {}}, "qwen3_5_moe": {"linear": {}, "experts": {}}}
IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2")
# Seconds per temporal patch of the videos of a conversation.
SECONDS = {"video": [0.7], "mixed": [1.5, 2.3]}
# Kinds of the conversations of each pack, and its padding. A text of one token trains nothing, and is a segment.
PACKS = [
    (["mixed", "text", "image", "one token", "video"], 5),
    (["one token", "text", "text"], 1),
    (["images", "mixed"], 0),
]


@dataclass(frozen=True)
class Results:
    """Logits `[S, V]` of each conversation, the mean loss over all supervised tokens, and every gradient."""

    logits: list[Tensor]
    loss: float
    gradients: dict[str, Tensor]


def attend_by_segments(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Flash attention in torch, from the keywords that it takes."""
    assert attention_mask is None
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    assert cu_seq_lens_q.equal(cu_seq_lens_k)
    bounds = cu_seq_lens_q.tolist()
    assert (bounds[0], bounds[-1]) == (0, query.shape[2])
    lengths = [end - begin for begin, end in pairwise(bounds)]
    assert int(max_length_q) == int(max_length_k) == max(lengths)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *part,
            is_causal=module.is_causal if is_causal is None else is_causal,  # type: ignore[arg-type]
            scale=scaling,
            enable_gqa=True,
        )
        for part in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
) -> Tensor:
    """The kernel of the package flash_attn: `attend_by_segments` with its arguments, tokens `[T, H, D]`."""
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    bounds = {"cu_seq_lens_q": cu_seqlens_q, "cu_seq_lens_k": cu_seqlens_k}
    lengths = {"max_length_q": max_seqlen_q, "max_length_k": max_seqlen_k}
    unused = torch.nn.Module()
    return attend_by_segments(unused, *heads_first, None, scaling=softmax_scale, is_causal=causal, **bounds, **lengths)[
        0
    ][0]


@contextmanager
def flash_attention() -> Iterator[None]:
    """Transformers' flash attention runs on the CPU."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = attend_by_segments
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]


def load(folder: Path, implementation: str) -> Any:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    # Not by `set_attn_implementation`, which wants the package of flash attention.
    model.config._attn_implementation = implementation
    assert model.model.language_model.config._attn_implementation == implementation
    assert model.model.visual.config._attn_implementation == implementation
    return model


def samples(kinds: Sequence[str], seed: int, model: Any) -> list[Sample]:
    """Conversations, with the seconds per temporal patch of their videos."""
    whole = model.config.model_type == "qwen2_5_vl"
    found = []
    for index, kind in enumerate(kinds):
        make = text(1, seed) if kind == "one token" else conversation(kind, 10 * seed + index, whole_videos=whole)
        found.append((make, SECONDS.get(kind, []) if whole else []))
    return found


def collect(model: Any, logits: list[Tensor], loss: float) -> Results:
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return Results([x.detach() for x in logits], loss, gradients)


def one_by_one(model: Any, packs: Sequence[Sequence[Sample]]) -> Results:
    """Each conversation separately, with the positions that transformers computes."""
    supervised = sum(int((c.labels != -100).sum()) for pack in packs for c, _ in pack)
    logits, total = [], 0.0
    for c, seconds in (sample for pack in packs for sample in pack):
        times = {"second_per_grid_ts": torch.tensor(seconds)} if seconds else {}
        logits.append(model(**reference.model_inputs(c), **times).logits[0])
        loss = reference.token_losses(logits[-1], c.labels).sum() / supervised
        loss.backward()
        total += loss.item()
    return collect(model, logits, total)


def packed(model: Any, packs: Sequence[dict[str, Tensor]]) -> Results:
    """As a training loop does: a backward for each pack, with transformers' own loss."""
    supervised = sum(int((pack["labels"] != -100).sum()) for pack in packs)
    logits: list[Tensor] = []
    total = 0.0
    for pack in packs:
        out = model(**as_transformers_batch(pack, model))
        loss = out.loss * (pack["labels"] != -100).sum() / supervised
        loss.backward()
        total += loss.item()
        lengths = pack["segment_lengths"].tolist()
        assert out.logits.isfinite().all()
        logits += out.logits[0, : sum(lengths)].split(lengths)
    return collect(model, logits, total)


def pack_of(conversations: Sequence[Sample], padding: int, filler: int) -> dict[str, Tensor]:
    total = sum(len(c.tokens) for c, _ in conversations) + padding
    pack = reference.pack([c for c, _ in conversations], total, filler)
    seconds = [x for _, of_sample in conversations for x in of_sample]
    return pack | ({"second_per_grid_ts": torch.tensor(seconds)} if seconds else {})


def assert_equal(found: Results, expected: Results, bound: float = FP32) -> None:
    assert_close_in_norm(found.loss, expected.loss, bound)
    for logits, others in zip(found.logits, expected.logits, strict=True):
        assert_close_in_norm(logits, others, bound)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.any(), name
        assert_close_in_norm(found.gradients[name], gradient, bound)


def compare(folder: Path, implementations: Sequence[str], bound: float = FP32) -> None:
    """Assert that `PACKS` through a model equal their conversations, with each implementation and another filler."""
    model = load(folder, "sdpa")
    every = [samples(kinds, seed, model) for seed, (kinds, _) in enumerate(PACKS)]
    expected = one_by_one(model, every)
    for filler, implementation in enumerate(implementations, 5):
        packs = [pack_of(pack, padding, filler) for pack, (_, padding) in zip(every, PACKS, strict=True)]
        assert_equal(packed(load(folder, implementation), packs), expected, bound)
