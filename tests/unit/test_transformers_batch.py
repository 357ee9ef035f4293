"""The keywords of transformers' models for a pack, by hand, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlbridge.integrations import as_transformers_batch
from megatron_vlbridge.integrations import transformers_batch as integration
from tests import pipeline_models, reference
from tests.errors import rejects

# Two samples, of 3 tokens and of 1, and 2 tokens of padding.
TOKENS, LABELS = [20, 21, 22, 30, 5, 5], [21, 22, -100, -100, -100, -100]
SEGMENTS = [0, 0, 0, 1, 2, 2]


def model_of(kind: str = "qwen3_vl", implementation: str = "sdpa") -> Any:
    model = pipeline_models.build(kind)
    model.config._attn_implementation = implementation
    return model


def pack_of(**changes: Tensor | None) -> dict[str, Tensor]:
    pack: dict[str, Any] = reference.pack([reference.text(3, 0), reference.text(1, 0)], total=6)
    pack |= {"tokens": torch.tensor(TOKENS), "labels": torch.tensor(LABELS)} | changes
    return {key: tensor for key, tensor in pack.items() if tensor is not None}


def with_image() -> dict[str, Tensor]:
    return reference.pack([reference.conversation("image", 0), reference.conversation("video", 1)], total=60)


def test_each_token_attends_to_earlier_ones_of_its_segment() -> None:
    model = model_of()
    found = as_transformers_batch(pack_of(), model)
    allowed = [[SEGMENTS[k] == SEGMENTS[q] and k <= q for k in range(6)] for q in range(6)]
    assert found["attention_mask"].tolist() == [[allowed]]
    assert found["input_ids"].tolist() == [TOKENS]
    assert found["labels"].tolist() == [[-100, *LABELS[:-1]]] == [[-100, 21, 22, -100, -100, -100]]
    assert found["position_ids"].tolist() == [[[0, 1, 2, 0, 0, 1]]] * 4
    names = ["input_ids", "labels", "position_ids", "attention_mask", "use_cache"]
    assert list(found) == names, "media of a pack without them"
    assert found["use_cache"] is False
    model.config._attn_implementation = "eager"
    found = as_transformers_batch(pack_of(), model.bfloat16())
    lowest = torch.finfo(torch.bfloat16).min
    assert found["attention_mask"].dtype == torch.bfloat16
    assert found["attention_mask"].tolist() == [[[[0.0 if x else lowest for x in row] for row in allowed]]]


def test_flash_attention_gets_the_bounds_of_segments() -> None:
    found = as_transformers_batch(pack_of(), model_of(implementation="flash_attention_2"))
    assert "attention_mask" not in found
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert (found[key].dtype, found[key].tolist()) == (torch.int32, [0, 3, 4, 6])
    assert (found["max_length_q"], found["max_length_k"]) == (3, 3)


def test_linear_attention_gets_the_index_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    with rejects("Qwen3_5ForConditionalGeneration: linear attention", "flash-linear-attention and causal-conv1d"):
        as_transformers_batch(pack_of(), model_of("qwen3_5"))
    monkeypatch.setattr(integration, "LINEAR_PACKAGES", {"torch": "torch", "absent_kernels": "absent"})
    with rejects("expected the packages torch and absent, did not find absent."):
        as_transformers_batch(pack_of(), model_of("qwen3_5"))
    monkeypatch.setattr(integration, "LINEAR_PACKAGES", {"torch": "torch"})
    found = as_transformers_batch(pack_of(), model_of("qwen3_5"))
    assert (found["seq_idx"].dtype, found["seq_idx"].tolist()) == (torch.int32, [SEGMENTS])
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert "attention_mask" in found
    assert not {"seq_idx", "cu_seq_lens_q"} & as_transformers_batch(pack_of(), model_of()).keys()
    monkeypatch.setattr(integration, "LINEAR_VERSION", (99, 0))
    with rejects("expected transformers 99.0 or newer", "packs of one sample"):
        as_transformers_batch(pack_of(), model_of("qwen3_5"))


def test_a_single_sample_needs_no_segments_in_linear_attention() -> None:
    alone = pack_of(segment_lengths=torch.tensor([3]), images_per_segment=torch.tensor([0]))
    alone["videos_per_segment"] = torch.tensor([0])
    found = as_transformers_batch(alone, model_of("qwen3_5"))
    assert not {"seq_idx", "cu_seq_lens_q"} & found.keys()
    with rejects("linear attention"):  # the keywords of flash attention reach it
        as_transformers_batch(alone, model_of("qwen3_5", "flash_attention_2"))


def test_media_are_those_of_the_pack() -> None:
    pack = with_image()
    found = as_transformers_batch(pack, model_of())
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert found[key].equal(pack[key])


def test_frames_of_whole_videos_differ_in_time() -> None:
    """Three samples: text, a video of 2 frames of 2 x 1 tokens with text, text."""
    model = model_of()
    model.config.model_type = "qwen2_5_vl"
    model.config.vision_config.tokens_per_second = 2
    lengths = [2, 6, 2]
    pack = reference.pack([reference.text(length, 0) for length in lengths], total=11)
    pack["tokens"][2:6] = reference.VIDEO
    pack |= {"videos_per_segment": torch.tensor([0, 1, 0]), "video_grid_thw": torch.tensor([[2, 4, 2]])}
    pack |= {"pixel_values_videos": torch.zeros(16, reference.PATCH_DIM), "second_per_grid_ts": torch.tensor([1.7])}
    token = [0, 1, *range(6), 0, 1, 0]
    time, row, column = [0, 0, 3, 3], [0, 1, 0, 1], [0, 0, 0, 0]
    expected = [token, *([0, 1, *axis, 2, 3, 0, 1, 0] for axis in (time, row, column))]
    assert as_transformers_batch(pack, model)["position_ids"][:, 0].tolist() == expected


@pytest.mark.parametrize("seconds", [None, [0.5]])
def test_the_time_of_whole_videos_is_required(seconds: list[float] | None) -> None:
    model = model_of()
    model.config.model_type = "qwen2_5_vl"
    model.config.vision_config.tokens_per_second = 2
    pack = with_image()
    if seconds is None:
        with rejects("second_per_grid_ts: expected 1 values", "found 0", "one second"):
            as_transformers_batch(pack, model)
    else:
        with rejects("video 0: expected its 12 tokens in a row", "other tokens between"):
            as_transformers_batch(pack | {"second_per_grid_ts": torch.tensor(seconds)}, model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_weights": torch.ones(6)}, "unknown keys: loss_weights"),
        ({"second_per_grid_ts": torch.ones(0)}, "unknown keys: second_per_grid_ts"),
        ({"labels": None}, "missing keys: labels"),
        ({"tokens": torch.tensor([TOKENS])}, "expected tokens and labels [T] on the CPU, found [1, 6] and [6]"),
        ({"labels": torch.tensor(LABELS[1:])}, "expected tokens and labels [T] on the CPU, found [6] and [5]"),
        ({"segment_lengths": torch.tensor([3, 4])}, "a sum of at most 6, found [3, 4]"),
        ({"segment_lengths": torch.tensor([3, 0])}, "expected positive lengths"),
        ({"segment_lengths": torch.zeros(0, dtype=torch.int64)}, "found []"),
        ({"labels": torch.tensor([21, 22, 30, -100, -100, -100])}, "labels: segment 0: expected -100"),
        ({"labels": torch.tensor([21, 22, -100, 5, -100, -100])}, "labels: segment 1: expected -100"),
        ({"labels": torch.tensor([21, 22, -100, -100, -100, 5])}, "labels: padding: expected -100"),
        ({"pixel_values": torch.zeros(4, reference.PATCH_DIM)}, "pixel_values: expected 0 patches"),
        ({"tokens": torch.tensor([20, 10, 22, 30, 5, 5])}, "segment 0"),
        ({"images_per_segment": torch.tensor([1, 0])}, "images_per_segment: expected"),
    ],
)
def test_a_pack_that_does_not_belong_together_is_refused(change: dict[str, Tensor], words: str) -> None:
    with rejects(words):
        as_transformers_batch(pack_of(**change), model_of())


def test_what_is_not_verified_is_refused_by_name() -> None:
    pack = pack_of()
    with rejects("expected a model of transformers", "found kimi_k25", start="Kimi_K25ForConditionalGeneration"):
        as_transformers_batch(pack, model_of("kimi_k25"))
    with rejects("found None", "its .module", start="Sequential"):
        as_transformers_batch(pack, torch.nn.Sequential(model_of()))
    with rejects("qwen3_vl_text: expected", "eager, sdpa, flash_attention_2, found flex_attention"):
        as_transformers_batch(pack, model_of(implementation="flex_attention"))
    model = model_of()
    model.config.vision_config._attn_implementation = "flex_attention"
    with rejects("qwen3_vl_vision: expected", "found flex_attention"):
        as_transformers_batch(pack, model)
    model = model_of()
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with rejects("layer_types", "sliding_attention"):
        as_transformers_batch(pack, model)
    model = model_of("qwen3_vl_moe")
    model.config.text_config.output_router_logits = True
    with rejects("output_router_logits: expected False", "of its samples"):
        as_transformers_batch(pack, model)
