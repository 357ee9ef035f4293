"""Encode a conversation as tokens, a loss mask (see `labels.turns`) and patches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.mask import loss_mask
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.labels.prompt import Prompt, make_prompt
from megatron_vlbridge.data.labels.turns import ExcludedTurn
from megatron_vlbridge.data.media import DEFAULTS, Conversation, MediaShape
from megatron_vlbridge.data.messages import (
    message_name,
    message_parts,
)
from megatron_vlbridge.data.processors.interface import ConversationProcessor
from megatron_vlbridge.data.processors.published import as_conversation_processor
from megatron_vlbridge.data.processors.runs import encode_runs
from megatron_vlbridge.errors import VLBridgeError

DEFAULT_LABELS = LabelOptions()


@dataclass(frozen=True, eq=False)
class Sample:
    """An encoded conversation of L tokens, n images and m videos.

    `input_ids` is int64 `[L]`; `loss_mask` bool `[L]`, True for a supervised token (not shifted). Patches are float32
    `[P, patch_dim]`, in order, 0 rows where there are none; grids, in patches, int64 `[n, 3]` and `[m, 3]`.
    `excluded_turns` are the assistant turns excluded from the loss, with the reasons; `skipped_turns` the messages
    that were not to be learned. `loss_weights` float32 `[L]`: the weight of each supervised token; None: all are 1.
    """

    input_ids: Tensor
    loss_mask: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    pixel_values_videos: Tensor
    video_grid_thw: Tensor
    excluded_turns: tuple[ExcludedTurn, ...] = ()
    skipped_turns: tuple[int, ...] = ()
    loss_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class MeasuredConversation:
    """What a `Sample` has beside the patches, in the same form."""

    input_ids: Tensor
    loss_mask: Tensor
    image_grid_thw: Tensor
    video_grid_thw: Tensor
    excluded_turns: tuple[ExcludedTurn, ...] = ()
    skipped_turns: tuple[int, ...] = ()
    loss_weights: Tensor | None = None

    def without_patches(self) -> Sample:
        """As a sample whose images and videos have 0 patches, of 0 values."""
        none = torch.zeros(0, 0)
        turns = self.excluded_turns, self.skipped_turns
        return Sample(
            self.input_ids,
            self.loss_mask,
            none,
            self.image_grid_thw,
            none,
            self.video_grid_thw,
            *turns,
            self.loss_weights,
        )


def encode_conversation(
    messages: Conversation,
    processor: ProcessorMixin | ConversationProcessor,
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
    `tool_calls` (see `labels.tools`), `train`, `weight`, tool messages `tool_call_id` and `name`, which must be those
    of the calls. Other keys are rejected. `tools` are those of the conversation, JSON schemas of functions.

    The loss covers the assistant's reasoning, content and calls, byte for byte, and the closing `<|im_end|>`. A turn
    that the chat template modifies (the template of a thinking model drops the reasoning of earlier turns, for example)
    is excluded from the loss and listed in `Sample.excluded_turns`. Assistant messages with `"train": false` or the
    `"weight"` 0 are not learned; another weight multiplies the losses of the message's tokens. `labels` sets which
    others are learned, `media` how images and frames are read.

    Raises VLBridgeError: a message does not have this format; a text contains a special token (unless `labels` makes it
    plain text); the chat template modifies system, user or tool content, or does not render tools, calls or reasoning;
    placeholders, grids, patches and media do not match; there is no supervised token, or of an answer only its
    end (unless `allow_no_loss`). Errors name messages and parts by index, from 0.

    Example: of `[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]` the supervised text,
    `processor.decode(sample.input_ids[sample.loss_mask])`, is `A cat.<|im_end|>`.
    """
    adapter = as_conversation_processor(processor)
    prompt = make_prompt(messages, adapter, tools or [], labels)
    load = partial(adapter.load, options=media)
    images, videos = (_load_media(messages, kind, load) for kind in ("image", "video"))
    encoded = adapter.encode(prompt.texts, images, videos)
    ids = prompt.join(encoded["input_ids"])
    mask = loss_mask(ids, prompt.turns, messages, adapter, labels, allow_no_loss=allow_no_loss)
    shapes, no_grids = adapter.patch_shapes, torch.zeros(0, 3, dtype=torch.int64)
    sample = Sample(
        ids,
        mask.supervised,
        encoded.get("pixel_values", torch.zeros(0, *shapes.get("image", ()))),
        encoded.get("image_grid_thw", no_grids),
        encoded.get("pixel_values_videos", torch.zeros(0, *shapes.get("video", ()))),
        encoded.get("video_grid_thw", no_grids),
        mask.excluded_turns,
        mask.skipped_turns,
        mask.weights,
    )
    _check_media(sample, len(images), len(videos), adapter)
    return sample


def measure_conversation(
    messages: Conversation,
    processor: ProcessorMixin | ConversationProcessor,
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
    adapter = as_conversation_processor(processor)
    prompt = make_prompt(messages, adapter, tools or [], labels)
    shape = partial(adapter.measure, options=media)
    shapes = {kind: _load_media(messages, kind, shape) for kind in ("image", "video")}
    ids = _expanded_ids(prompt, shapes, adapter)
    mask = loss_mask(ids, prompt.turns, messages, adapter, labels, allow_no_loss=allow_no_loss)
    images, videos = (
        torch.tensor([one.grid for one in shapes[kind]], dtype=torch.int64).view(-1, 3) for kind in ("image", "video")
    )
    turns = mask.excluded_turns, mask.skipped_turns
    return MeasuredConversation(ids, mask.supervised, images, videos, *turns, mask.weights)


def _expanded_ids(prompt: Prompt, shapes: dict[str, list[MediaShape]], processor: ConversationProcessor) -> Tensor:
    """The tokens of a prompt whose placeholders are expanded as by the processor."""
    texts = processor.expand_texts(prompt.texts, shapes)
    placeholders = list(processor.media_tokens.values())
    return prompt.join([encode_runs(text, processor.tokenizer, placeholders) for text in texts])


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


def _check_media(sample: Sample, num_images: int, num_videos: int, processor: ConversationProcessor) -> None:
    """Check that media, grids, patches and placeholders match."""
    for kind, count, grid, pixels in (
        ("image", num_images, sample.image_grid_thw, sample.pixel_values),
        ("video", num_videos, sample.video_grid_thw, sample.pixel_values_videos),
    ):
        expected = [int(grid.prod(1).sum()), *processor.patch_shapes.get(kind, ())]
        if len(grid) != count or list(pixels.shape) != expected or pixels.dtype != torch.float32:
            raise VLBridgeError(
                f"{count} {kind}s in the messages: expected {count} grids and patches float32 {expected}, found "
                f"{len(grid)} grids {grid.tolist()} and patches {pixels.dtype} {list(pixels.shape)}"
            )
    processor.check_tokens(sample.input_ids, {"image": sample.image_grid_thw, "video": sample.video_grid_thw})
