"""Tiny models of transformers' vision-language classes, batches for them, and their results without a pipeline."""

import copy
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests import reference
from tests.reference import END, IMAGE, START, VIDEO

LENGTH = 40
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_TEXT = reference._TEXT | {"num_hidden_layers": 5, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
_VISION = reference._VISION | {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
_VISION |= {"out_hidden_size": 32, "num_position_embeddings": 16}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_HALF = {"head_dim": 16, "rope_parameters": _MROPE | {"rope_theta": 1e7, "partial_rotary_factor": 0.5}}
_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_KIMI_VISION = {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4, "num_attention_heads": 2}
_KIMI_VISION |= {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
_PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_PIXTRAL |= {"num_attention_heads": 2, "patch_size": 4, "image_size": 32, "head_dim": 8}
_MISTRAL = {"model_type": "mistral", "sliding_window": None}
_AUDIO = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}
_AUDIO |= {"output_dim": 32, "downsample_hidden_size": 8}

# The class of each kind without `ForConditionalGeneration`, and fields of its config.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_vl": (
        "Qwen3VL",
        {"text_config": _TEXT | {"rope_parameters": _MROPE}, "vision_config": _VISION | _DEEPSTACK, **_IDS},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {"text_config": _TEXT | {"rope_parameters": _MROPE} | _EXPERTS, "vision_config": _VISION | _DEEPSTACK, **_IDS},
    ),
    "qwen3_5": ("Qwen3_5", {"text_config": _TEXT | _LINEAR | _HALF, "vision_config": _VISION, **_IDS}),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            "text_config": _TEXT | _LINEAR | _HALF | _EXPERTS | {"shared_expert_intermediate_size": 24},
            "vision_config": _VISION,
            **_IDS,
        },
    ),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeThinker",
        {
            "text_config": _TEXT | {"rope_parameters": _MROPE} | _EXPERTS,
            "vision_config": _VISION | _DEEPSTACK,
            "audio_config": _AUDIO,
            **_IDS,
        },
    ),
    "kimi_k25": (
        "Kimi_K25",
        {
            "text_config": _TEXT | _DEEPSEEK,
            "vision_config": _KIMI_VISION,
            "projection_hidden_size": 16,
            "tie_word_embeddings": False,
            **_IDS,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": _TEXT | _MISTRAL,
            "vision_config": _PIXTRAL,
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
    ),
}
# Those without videos.
IMAGES_ONLY = ("mistral3",)


@functools.cache
def config_of(kind: str) -> Any:
    import transformers

    name, fields = KINDS[kind]
    return getattr(transformers, f"{name}Config")(**fields)


def build(kind: str) -> Any:
    """The model, the same every time; without the parts that images and videos do not reach."""
    return copy.deepcopy(_model(kind))


@functools.cache
def _model(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{KINDS[kind][0]}ForConditionalGeneration")(config_of(kind)).float()
    reference.randomize(model)
    if kind == "qwen3_omni_moe":
        model.model.audio_tower = None
    return model


def batch_of(kind: str, counts: Sequence[tuple[int, int]], seed: int, padding: int = 0) -> dict[str, Tensor]:
    """A batch of samples with these numbers of images and videos, the first of which has `padding` on the left."""
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, images, videos = [], [], []
    for of_images, of_videos in counts:
        media = ["image"] * of_images + ["video"] * of_videos
        draw.shuffle(media)
        row = [draw.randint(20, 119) for _ in range(1 + (0 if rows else padding))]
        for what in media:
            # transformers' Kimi fails on a video of two temporal patches, its Mistral3 on a batch of one media token.
            frames = 1 if what == "image" or kind == "kimi_k25" else 2
            height, width = 4 if kind == "mistral3" else 2 * draw.randint(1, 2), 2 * draw.randint(1, 2)
            (images if what == "image" else videos).append([frames, height, width])
            row += _placeholders(kind, what, frames, height * width // 4)
        rows.append(row + [draw.randint(20, 119) for _ in range(LENGTH - len(row))])
    ids = torch.tensor(rows)
    assert ids.shape == (len(counts), LENGTH)
    batch = {"input_ids": ids}
    for name, pixels, grids, index in (
        ("images", "pixel_values", "image_grid_thw", 0),
        ("videos", "pixel_values_videos", "video_grid_thw", 1),
    ):
        items = (images, videos)[index]
        if items:
            batch[f"n_{name}_per_sample"] = torch.tensor([x[index] for x in counts])
            batch |= _pixels(kind, pixels, grids, torch.tensor(items), noise)
    batch["labels"] = torch.where(ids >= 20, ids, -100).roll(-1, 1)
    batch["labels"][:, -1] = -100
    if padding:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :padding] = 0
        batch["labels"][0, :padding] = -100
    return batch | {"position_ids": _positions(kind, batch)}


def _placeholders(kind: str, what: str, frames: int, tokens: int) -> list[int]:
    token = IMAGE if what == "image" else VIDEO
    if kind == "qwen3_omni_moe":
        return [START, *[token] * (frames * tokens), END]
    return [START, *[token] * tokens, END] * frames


def _pixels(kind: str, pixels: str, grids: str, items: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
    if kind == "mistral3":
        sizes = items[:, 1:] * 4
        return {"image_sizes": sizes, pixels: torch.randn(len(items), 3, *sizes.amax(0).tolist(), generator=noise)}
    patch = (3, 4, 4) if kind == "kimi_k25" else (reference.PATCH_DIM,)
    return {grids: items, pixels: torch.randn(int(items.prod(1).sum()), *patch, generator=noise)}


def _positions(kind: str, batch: Mapping[str, Tensor]) -> Tensor:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if kind in ("kimi_k25", "mistral3"):
        plain = torch.arange(LENGTH).expand_as(ids)
        return plain if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    model = _model(kind).model
    grids = {key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    if kind == "qwen3_omni_moe":
        seconds = None if grids["video_grid_thw"] is None else torch.full((len(grids["video_grid_thw"]),), 0.5)
        mask = torch.ones_like(ids) if mask is None else mask
        return model.get_rope_index(ids, **grids, attention_mask=mask, second_per_grids=seconds)[0]
    kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return model.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **grids)[0]


def loss_of(logits: Tensor, labels: Tensor, supervised: int) -> Tensor:
    """The sum over tokens, divided by the supervised tokens of the global batch."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / supervised


def without_pipeline(kind: str, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor], Tensor]:
    """Loss, gradients and logits of the model, run on the whole batch at once."""
    model = build(kind).train()
    not_of_the_model = ("labels", "n_images_per_sample", "n_videos_per_sample")
    logits = model(**{key: x for key, x in batch.items() if key not in not_of_the_model}, use_cache=False).logits
    loss = loss_of(logits, batch["labels"], int((batch["labels"] != -100).sum()))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, logits.detach()
