"""The oracle: a tiny random Qwen3-VL or Qwen3.5 of transformers, run conversation by conversation."""

import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.closeness import relative_error as relative_error

IMAGE, VIDEO, START, END = 10, 11, 8, 9
TEXT_IDS = range(20, 120)
PATCH_DIM = 3 * 2 * 4 * 4


@dataclass(frozen=True)
class Conversation:
    """One conversation: tokens, labels (next token or -100), and the media in the order of the tokens."""

    tokens: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    image_grids: torch.Tensor
    videos: torch.Tensor
    video_grids: torch.Tensor
    position_ids: torch.Tensor | None = None
    """`[3, S]`, time, row and column of each token, in place of those that transformers computes."""


# The kinds of model, as options of `write_checkpoint`.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"experts": {}},
    "linear": {"linear": {}},
    "linear-experts": {"linear": {}, "experts": {}},
}

# The names of transformers' classes, for models without and with experts.
_QWEN3_VL, _QWEN3_5 = ("Qwen3VL", "Qwen3VLMoe"), ("Qwen3_5", "Qwen3_5Moe")
_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROPE = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
# Full attention, by default in the last of each four layers, rotates half of each head.
_LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    # transformers 5.8 saves it here too, with the default of the class if it is not given.
    "partial_rotary_factor": 0.5,
}
_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
}


def write_checkpoint(
    folder: Path,
    *,
    tied: bool = False,
    seed: int = 0,
    layers: int = 4,
    shard: str = "100KB",
    experts: Mapping[str, object] | None = None,
    linear: Mapping[str, object] | None = None,
    classes: str = "",
    text_fields: Mapping[str, object] | None = None,
    vision_fields: Mapping[str, object] | None = None,
) -> Path:
    """Write a tiny random fp32 checkpoint with transformers, in several shards.

    Dense Qwen3-VL, with `experts` Qwen3-VL-MoE, with `linear` Qwen3.5, with both Qwen3.5-MoE; these are fields of the
    text config in addition to the sizes here. `classes` is the name that the classes of a model like one of these begin
    with. `text_fields` and `vision_fields` override fields of the text and vision
    config.
    """
    import transformers

    name = classes or (_QWEN3_VL if linear is None else _QWEN3_5)[experts is not None]
    text: dict[str, object] = _TEXT | {"num_hidden_layers": layers, "rope_parameters": _ROPE}
    vision: dict[str, object] = dict(_VISION)
    if experts is not None:
        text |= {**_EXPERTS, **experts}
    if linear is None:
        vision["deepstack_visual_indexes"] = [0, 2]
    else:
        text |= {**_LINEAR, **linear}
        if experts is not None:
            del text["intermediate_size"]
            text["shared_expert_intermediate_size"] = 40
    config = getattr(transformers, f"{name}Config")(
        text_config={**text, **(text_fields or {})},
        vision_config={**vision, **(vision_fields or {})},
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float()
    randomize(model)
    if linear is not None:
        model.get_input_embeddings().weight.data *= 4
    # Qwen3.5-MoE is published with fused experts; transformers' default is to save each expert.
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=linear is None)
    return folder


def randomize(model: torch.nn.Module) -> None:
    """Add noise to transformers' start.

    Norms stay near one (or zero, where they are zero-centred) and biases near zero, but none is trivial, so that
    swapped tensors are detected.
    """
    for name, parameter in model.named_parameters():
        parameter.data += 0.06 * torch.randn_like(parameter)
        if name.endswith(".A_log"):
            # From heads that keep their state over a whole conversation to heads that forget it within a few tokens.
            # Where it is forgotten at once, gradients through the norm after it have errors of 1e-5 in transformers.
            parameter.data.uniform_(math.log(0.01), math.log(2.0))
        elif name.endswith(".linear_attn.norm.weight"):
            # Not zero-centred. Far from one, subtracting one and adding it again is not exact.
            parameter.data.uniform_(0.3, 3.0)
        elif name.endswith(".linear_attn.out_proj.weight"):
            # What a layer adds is small beside what it gets, so that the next layers do not amplify rounding errors.
            parameter.data *= 0.25


def conversation(
    kind: str, seed: int, *, merge_size: int = 2, patch_dim: int = PATCH_DIM, whole_videos: bool = False
) -> Conversation:
    """A random conversation of a `kind`: text, image, images, video or mixed.

    Grids scale with `merge_size`, so that the tokens are the same. With `whole_videos`, as in Qwen2.5-VL, no text is
    between the frames of a video.
    """
    random = torch.Generator().manual_seed(seed)
    media = {
        "text": [],
        "image": [("image", (1, 4, 6))],
        "images": [("image", (1, 4, 4)), ("image", (1, 8, 6)), ("image", (1, 2, 10))],
        "video": [("video", (3, 4, 4))],
        "mixed": [("image", (1, 6, 4)), ("video", (2, 2, 4)), ("image", (1, 4, 4)), ("video", (1, 4, 2))],
    }[kind]

    def words(least: int, most: int) -> list[int]:
        count = int(torch.randint(least, most, (1,), generator=random))
        return torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (count,), generator=random).tolist()

    tokens = words(3, 7)
    for what, (frames, height, width) in media:
        for _ in range(1 if whole_videos else frames):
            placeholder = IMAGE if what == "image" else VIDEO
            size = height * width // 4 * (frames if whole_videos else 1)
            tokens += [START, *[placeholder] * size, END, *words(1, 4)]
    tokens += words(4, 9)
    ids = torch.tensor(tokens)
    supervised = (torch.rand(len(ids), generator=random) < 0.7) & (ids >= TEXT_IDS.start)
    targets = torch.where(supervised, ids, -100)
    labels = torch.cat((targets[1:], torch.tensor([-100])))

    def patches(wanted: str) -> tuple[torch.Tensor, torch.Tensor]:
        grids = torch.tensor([grid for what, grid in media if what == wanted], dtype=torch.int64).view(-1, 3)
        grids = grids * torch.tensor([2, merge_size, merge_size]) // 2
        return torch.randn(int(grids.prod(1).sum()), patch_dim, generator=random), grids

    return Conversation(ids, labels, *patches("image"), *patches("video"))


def text(length: int, seed: int) -> Conversation:
    """A conversation of `length` tokens of text, each of which but the first is a label."""
    tokens = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (length,), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat((tokens[1:], torch.tensor([-100])))
    none = torch.zeros(0, PATCH_DIM), torch.zeros(0, 3, dtype=torch.int64)
    return Conversation(tokens, labels, *none, *none)


def pack(conversations: Sequence[Conversation], total: int, filler: int = 0) -> dict[str, torch.Tensor]:
    """The pack as from a dataset: the concatenated conversations, padded to `total` tokens."""

    def row(tensors: list[torch.Tensor], fill: int) -> torch.Tensor:
        joined = torch.cat(tensors)
        return torch.cat((joined, torch.full((total - len(joined),), fill)))

    return {
        "tokens": row([c.tokens for c in conversations], filler),
        "labels": row([c.labels for c in conversations], -100),
        "segment_lengths": torch.tensor([len(c.tokens) for c in conversations]),
        "pixel_values": torch.cat([c.images for c in conversations]),
        "image_grid_thw": torch.cat([c.image_grids for c in conversations]),
        "pixel_values_videos": torch.cat([c.videos for c in conversations]),
        "video_grid_thw": torch.cat([c.video_grids for c in conversations]),
        "images_per_segment": torch.tensor([len(c.image_grids) for c in conversations]),
        "videos_per_segment": torch.tensor([len(c.video_grids) for c in conversations]),
    }


def padded_batch(conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
    """The batch `[B, S]` of these conversations, padded alternately on the left and on the right."""
    width = max(len(c.tokens) for c in conversations) + 1
    batch = {
        "input_ids": torch.full((len(conversations), width), 5),
        "attention_mask": torch.zeros(len(conversations), width, dtype=torch.int64),
        "labels": torch.full((len(conversations), width), -100),
    }
    for row, c in enumerate(conversations):
        span = slice(0, len(c.tokens)) if row % 2 else slice(width - len(c.tokens), width)
        batch["input_ids"][row, span], batch["labels"][row, span] = c.tokens, c.labels
        batch["attention_mask"][row, span] = 1
    joined = pack(conversations, width * len(conversations))
    media = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    return batch | {key: joined[key] for key in media}


@dataclass(frozen=True)
class Reference:
    """The results of transformers.

    For each conversation the logits `[S, V]`, the token losses `[S]` and the output `[levels, N, H]` of the vision
    tower for its images and its videos; the gradient of every parameter for the mean loss over all supervised tokens.
    """

    logits: list[torch.Tensor]
    losses: list[torch.Tensor]
    loss: float
    gradients: dict[str, torch.Tensor]
    vision: list[dict[str, torch.Tensor]]


_CACHE: dict[tuple[Path, bytes, torch.dtype], Reference] = {}


def run_transformers(
    folder: Path, conversations: Sequence[Conversation], dtype: torch.dtype = torch.float32
) -> Reference:
    """Forward and backward of each conversation separately; cached by checkpoint, conversations and dtype."""
    key = folder, digest(conversations), dtype
    if key not in _CACHE:
        with recurrent_delta_rule():
            _CACHE[key] = run_transformers_as_it_is(folder, conversations, dtype)
    return _CACHE[key]


def digest(conversations: Sequence[Conversation]) -> bytes:
    """A hash of the conversations."""
    parts = (x.numpy().tobytes() for c in conversations for x in vars(c).values() if x is not None)
    return hashlib.sha256(b"".join(parts)).digest()


@contextmanager
def recurrent_delta_rule() -> Iterator[None]:
    """Let transformers run Qwen3.5 token by token.

    Its chunked rule takes differences of a running sum, which cancel: the gradients of the decay have errors of 1e-3.
    It is the rule in torch, also where flash-linear-attention is installed.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as experts

    chunked, recurrent = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
    # Newer versions wrap the rule in torch by one that takes flash-linear-attention's if it is installed.
    dense_rule, experts_rule = (inspect.unwrap(getattr(module, recurrent)) for module in (dense, experts))
    with mock.patch.object(dense, chunked, dense_rule), mock.patch.object(experts, chunked, experts_rule):
        yield


def run_transformers_as_it_is(folder: Path, conversations: Sequence[Conversation], dtype: torch.dtype) -> Reference:
    """`run_transformers` with the chunked rule, where the model has linear attention."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).train()
    outputs = [model(**model_inputs(c)).logits[0].float() for c in conversations]
    losses = [token_losses(x, c.labels) for x, c in zip(outputs, conversations, strict=True)]
    supervised = sum(int((c.labels != -100).sum()) for c in conversations)
    loss = torch.cat(losses).sum() / supervised
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    detached = [x.detach() for x in outputs], [x.detach() for x in losses]
    return Reference(*detached, loss.item(), gradients, [tower_outputs(model, c) for c in conversations])


def model_inputs(c: Conversation) -> dict[str, Any]:
    """The arguments of transformers' model for a conversation."""
    kinds = (c.tokens == IMAGE).long() + 2 * (c.tokens == VIDEO).long()
    inputs = {"input_ids": c.tokens[None], "mm_token_type_ids": kinds[None], "use_cache": False}
    if c.position_ids is not None:
        inputs["position_ids"] = c.position_ids[:, None]
    if len(c.images):
        inputs |= {"pixel_values": c.images, "image_grid_thw": c.image_grids}
    if len(c.videos):
        inputs |= {"pixel_values_videos": c.videos, "video_grid_thw": c.video_grids}
    return inputs


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each token `[S]`, zero where it has no label."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


@torch.no_grad()
def tower_outputs(model: Any, c: Conversation) -> dict[str, torch.Tensor]:
    """The output of transformers' tower for the images and the videos of a conversation, with deepstack features."""
    found = {}
    for kind, pixels, grids in (("images", c.images, c.image_grids), ("videos", c.videos, c.video_grids)):
        if len(pixels):
            tower = model.model.visual(pixels, grid_thw=grids)
            found[kind] = torch.stack([tower.pooler_output, *getattr(tower, "deepstack_features", ())])
    return found
