"""Encode a conversation as tokens, a loss mask (see `labels.turns`) and patches."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.mask import loss_mask
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.labels.prompt import Prompt, make_prompt
from megatron_vlbridge.data.labels.turns import ExcludedTurn
from megatron_vlbridge.data.media import (
    DEFAULTS,
    Conversation,
    MediaShape,
    Video,
    image_size,
    load_image,
    load_video,
    media_shape,
    placeholder_runs,
    with_sizes,
)
from megatron_vlbridge.data.messages import (
    message_name,
    message_parts,
)
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.positions import mrope_positions

DEFAULT_LABELS = LabelOptions()


@dataclass(frozen=True, eq=False)
class Sample:
    """An encoded conversation of L tokens, n images and m videos.

    `input_ids` is int64 `[L]`; `loss_mask` bool `[L]`, True for a supervised token (not shifted). Patches are float32
    `[P, patch_dim]`, in order, 0 rows where there are none; grids, in patches, int64 `[n, 3]` and `[m, 3]`.
    `excluded_turns` are the assistant turns excluded from the loss, with the reasons; `skipped_turns` the messages
    that were not to be learned.
    """

    input_ids: Tensor
    loss_mask: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    pixel_values_videos: Tensor
    video_grid_thw: Tensor
    excluded_turns: tuple[ExcludedTurn, ...] = ()
    skipped_turns: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class MeasuredConversation:
    """What a `Sample` has beside the patches, in the same form."""

    input_ids: Tensor
    loss_mask: Tensor
    image_grid_thw: Tensor
    video_grid_thw: Tensor
    excluded_turns: tuple[ExcludedTurn, ...] = ()
    skipped_turns: tuple[int, ...] = ()


def encode_conversation(
    messages: Conversation,
    processor: ProcessorMixin,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    allow_no_loss: bool = False,
    media: MediaOptions = DEFAULTS,
    labels: LabelOptions = DEFAULT_LABELS,
) -> Sample:
    """Encode a conversation in the Hugging Face messages format with the processor of a checkpoint.

    A message is `{"role": "system" | "user" | "assistant" | "tool", "content": ...}`; the content is a string or a list
    of `{"type": "text", "text": str}` and, in user and tool messages, `{"type": "image", "image": path or PIL image}`
    and `{"type": "video", "video": path or frames, "fps": float}` (see `media.load_video`), both with `min_pixels`
    and `max_pixels` where these differ from the processor's. Assistant messages may have `reasoning_content`,
    `tool_calls` (see `labels.tools`) and `train`, tool messages `tool_call_id` and `name`, which must be those of the
    calls. Other keys are rejected. `tools` are those of the conversation, JSON schemas of functions.

    The loss covers the assistant's reasoning, content and calls, byte for byte, and the closing `<|im_end|>`. A turn
    that the chat template modifies (the template of a thinking model drops the reasoning of earlier turns, for example)
    is excluded from the loss and listed in `Sample.excluded_turns`. Assistant messages with `"train": false` are not
    learned; `labels` sets which others are. `media` sets how images and frames are read.

    Raises VLBridgeError: a message does not have this format; a text contains a special token (unless `labels` makes it
    plain text); the chat template modifies system, user or tool content, or does not render tools, calls or reasoning;
    placeholders, grids, patches and media do not match; there is no supervised token (unless `allow_no_loss`). Errors
    name messages and parts by index, from 0.

    Example: of `[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]` the supervised text,
    `processor.decode(sample.input_ids[sample.loss_mask])`, is `A cat.<|im_end|>`.
    """
    prompt = make_prompt(messages, processor, tools or [], labels)
    images = _load_media(messages, "image", partial(load_image, options=media))
    image_sizes = _load_media(
        messages, "image", partial(image_size, image_processor=processor.image_processor, options=media)
    )
    videos = _load_media(
        messages, "video", partial(load_video, options=media, video_processor=processor.video_processor)
    )
    sizes = with_sizes(processor, image_sizes, [video.size for video in videos])
    encoded = _run_processor(prompt, images, videos, sizes)
    ids = encoded["input_ids"]
    mask = loss_mask(ids, prompt.turns, messages, processor, labels, allow_no_loss=allow_no_loss)
    empty = torch.zeros(0, _patch_dim(processor)), torch.zeros(0, 3, dtype=torch.int64)
    sample = Sample(
        ids,
        mask.supervised,
        encoded.get("pixel_values", empty[0]),
        encoded.get("image_grid_thw", empty[1]),
        encoded.get("pixel_values_videos", empty[0]),
        encoded.get("video_grid_thw", empty[1]),
        mask.excluded_turns,
        mask.skipped_turns,
    )
    _check_media(sample, len(images), len(videos), processor)
    return sample


def measure_conversation(
    messages: Conversation,
    processor: ProcessorMixin,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    allow_no_loss: bool = False,
    media: MediaOptions = DEFAULTS,
    labels: LabelOptions = DEFAULT_LABELS,
) -> MeasuredConversation:
    """The tokens, loss mask and grids of `encode_conversation`, from the headers of media files, without decoding them.

    Raises VLBridgeError: as `encode_conversation`, except for what only decoding shows.

    Example: `len(measure_conversation(messages, processor).input_ids)`.
    """
    prompt = make_prompt(messages, processor, tools or [], labels)
    shape = partial(media_shape, processor=processor, options=media)
    shapes = {kind: _load_media(messages, kind, shape) for kind in ("image", "video")}
    ids = _expanded_ids(prompt, shapes, processor)
    mask = loss_mask(ids, prompt.turns, messages, processor, labels, allow_no_loss=allow_no_loss)
    images, videos = (
        torch.tensor([one.grid for one in shapes[kind]], dtype=torch.int64).view(-1, 3) for kind in ("image", "video")
    )
    return MeasuredConversation(ids, mask.supervised, images, videos, mask.excluded_turns, mask.skipped_turns)


def _expanded_ids(prompt: Prompt, shapes: dict[str, list[MediaShape]], processor: ProcessorMixin) -> Tensor:
    """The tokens of a prompt whose placeholders are expanded as by the processor."""
    kinds = {processor.image_token: "image", processor.video_token: "video"}
    remaining = {kind: iter(found) for kind, found in shapes.items()}
    counts: list[int] = []

    def expand(match: re.Match[str]) -> str:
        text, found = placeholder_runs(kinds[match[0]], next(remaining[kinds[match[0]]]), processor)
        counts.extend(found)
        return text

    # A run of a placeholder is tokenized as one and then repeated: it can be of thousands.
    placeholders = re.compile("|".join(map(re.escape, kinds)))
    texts = [placeholders.sub(expand, piece) for piece in prompt.texts]
    ids = prompt.join([torch.tensor(processor.tokenizer(text)["input_ids"]) for text in texts]).numpy()
    repeats = np.ones_like(ids)
    repeats[(ids == processor.image_token_id) | (ids == processor.video_token_id)] = counts
    return torch.from_numpy(ids.repeat(repeats))


def _load_media[T](messages: Conversation, kind: str, load: Callable[[dict[str, Any]], T]) -> list[T]:
    """Load all images or all videos in order; errors name the message and the part."""
    media: list[T] = []
    for index, message in enumerate(messages):
        for part_index, part in enumerate(message_parts(message)):
            if part["type"] == kind:
                try:
                    media.append(load(part))
                except VLBridgeError as error:
                    raise VLBridgeError(f"{message_name(messages, index)}, part {part_index}: {error}") from error
    return media


def _run_processor(
    prompt: Prompt, images: list[Image.Image], videos: list[Video], processor: ProcessorMixin
) -> dict[str, Tensor]:
    """Run the processor on one conversation; `input_ids` is `[L]`."""
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        minimum = processor.video_processor.temporal_patch_size
        for index, video in enumerate(videos):
            if len(video.frames) < minimum:
                raise VLBridgeError(f"video {index}: expected at least {minimum} frames, found {len(video.frames)}")
        media["videos"] = [video.frames for video in videos]
        media["video_metadata"] = [video.metadata for video in videos]
        media["do_sample_frames"] = False
    try:
        encoded = dict(processor(text=prompt.texts, return_tensors="pt", padding=len(prompt.texts) > 1, **media))
    except ValueError as error:
        raise VLBridgeError(f"the processor rejects {len(images)} images and {len(videos)} videos: {error}") from error
    if len(prompt.texts) == 1:
        return encoded | {"input_ids": prompt.join([encoded["input_ids"][0]])}
    rows = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
    return encoded | {"input_ids": prompt.join([row[mask] for row, mask in rows])}


def _check_media(sample: Sample, num_images: int, num_videos: int, processor: ProcessorMixin) -> None:
    """Check that media, grids, patches and placeholders match."""
    for kind, count, grid, pixels in (
        ("image", num_images, sample.image_grid_thw, sample.pixel_values),
        ("video", num_videos, sample.video_grid_thw, sample.pixel_values_videos),
    ):
        rows, width = int(grid.prod(1).sum()), _patch_dim(processor)
        if len(grid) != count or tuple(pixels.shape) != (rows, width):
            raise VLBridgeError(
                f"{count} {kind}s in the messages: expected {count} grids and patches [{rows}, {width}], "
                f"found {len(grid)} grids {grid.tolist()} and patches {list(pixels.shape)}"
            )
    # Raises where placeholders and grids do not match.
    mrope_positions(
        sample.input_ids,
        [len(sample.input_ids)],
        sample.image_grid_thw,
        sample.video_grid_thw,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        merge_size=processor.image_processor.merge_size,
        images_per_segment=[num_images],
        videos_per_segment=[num_videos],
    )


def _patch_dim(processor: ProcessorMixin) -> int:
    image_processor = processor.image_processor
    return len(image_processor.image_mean) * image_processor.temporal_patch_size * image_processor.patch_size**2
