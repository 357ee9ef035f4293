"""Encode a conversation as tokens, a loss mask (see `turns`) and patches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions, skipped_turns
from megatron_vlbridge.data.labels.special import (
    check_special_tokens,
    hide_special_tokens,
    plain_ids,
    shown_tokens,
    split_hidden,
)
from megatron_vlbridge.data.labels.template import check_reasoning, render, template_messages
from megatron_vlbridge.data.labels.tools import check_tools
from megatron_vlbridge.data.media import DEFAULTS, Conversation, Video, load_image, load_video
from megatron_vlbridge.data.messages import (
    check_conversation,
    message_name,
    message_parts,
)
from megatron_vlbridge.data.turns import (
    TURN_END,
    TURN_START,
    ExcludedTurn,
    Turn,
    add_newlines,
    match_turns,
    split_turns,
    supervised_mask,
)
from megatron_vlbridge.data.video_prompt import without_outer_pair
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.positions import mrope_positions

DEFAULT_LABELS = LabelOptions()
SPECIAL_REMEDY = {
    "reject": "remove them, or encode them as plain text with --special-tokens-in-text literal",
    "literal": "write each of them in one part",
}


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


def encode_conversation(
    messages: Conversation,
    processor: ProcessorMixin,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    allow_no_loss: bool = False,
    media: MediaOptions = DEFAULTS,
    labels: LabelOptions = DEFAULT_LABELS,
) -> Sample:
    """Encode a conversation in the Hugging Face messages format with a Qwen3-VL processor.

    A message is `{"role": "system" | "user" | "assistant" | "tool", "content": ...}`; the content is a string or a list
    of `{"type": "text", "text": str}` and, in user and tool messages, `{"type": "image", "image": path or PIL image}`
    and `{"type": "video", "video": frames, "fps": float}` (see `media.load_video`). Assistant messages may have
    `reasoning_content`, `tool_calls` (see `labels.tools`) and `train`, tool messages `tool_call_id` and `name`, which
    must be those of the calls. Other keys are rejected. `tools` are those of the conversation, JSON schemas of
    functions.

    The loss covers the assistant's reasoning, content and calls, byte for byte, and the closing `<|im_end|>`. A turn
    that the chat template modifies (the template of a thinking model drops the reasoning of earlier turns, for example)
    is excluded from the loss and listed in `Sample.excluded_turns`. Assistant messages with `"train": false` are not
    learned; `labels` sets which others are. `media` sets how images and frames are read.

    Raises VLBridgeError: a message does not have this format; a text contains a special token (unless `labels` makes it
    plain text); the chat template
    modifies system, user or tool content, or does not render tools, calls or reasoning; placeholders, grids, patches
    and media do not match; there is no supervised token (unless `allow_no_loss`). Errors name messages and parts by
    index, from 0.

    Example: of `[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]` the supervised text,
    `processor.decode(sample.input_ids[sample.loss_mask])`, is `A cat.<|im_end|>`.
    """
    check_conversation(messages)
    tools = list(tools or [])
    check_tools(tools)
    written, special = template_messages(messages), _special_tokens(processor)
    hidden: dict[str, str] = {}
    if labels.special_tokens == "literal":
        written, tools, hidden = hide_special_tokens(written, tools, special)
    check_special_tokens(written, tools, special, SPECIAL_REMEDY[labels.special_tokens])
    images = _load_media(messages, "image", partial(load_image, options=media))
    videos = _load_media(messages, "video", partial(load_video, options=media))
    check_reasoning(messages, processor)
    rendered = render(written, processor, **({"tools": tools} if tools else {}))
    text = without_outer_pair(rendered, processor)
    # What stands for an image and for a video, before the processor expands it.
    image = f"{processor.vision_start_token}{processor.image_token}{processor.vision_end_token}"
    turns = match_turns(split_turns(text), written, {"image": image, "video": processor.video_token}, tools)
    turns = [Turn(turn.role, shown_tokens(turn.content, hidden)) for turn in turns]
    encoded = _run_processor(split_hidden(text, hidden), hidden, images, videos, processor)
    ids = encoded["input_ids"][0]
    skipped = skipped_turns(messages, labels)
    loss_mask, excluded = supervised_mask(ids, turns, messages, processor, skipped)
    if labels.newline:
        add_newlines(loss_mask, ids, processor)
    if not allow_no_loss and not loss_mask.any():
        raise _no_supervised_token(messages, excluded, skipped)
    empty = torch.zeros(0, _patch_dim(processor)), torch.zeros(0, 3, dtype=torch.int64)
    sample = Sample(
        ids,
        loss_mask,
        encoded.get("pixel_values", empty[0]),
        encoded.get("image_grid_thw", empty[1]),
        encoded.get("pixel_values_videos", empty[0]),
        encoded.get("video_grid_thw", empty[1]),
        excluded,
        skipped,
    )
    _check_media(sample, len(images), len(videos), processor)
    return sample


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
    pieces: Sequence[str],
    hidden: Mapping[str, str],
    images: list[Image.Image],
    videos: list[Video],
    processor: ProcessorMixin,
) -> dict[str, Tensor]:
    """Run the processor on the pieces of one conversation; tokens have a batch dimension of 1.

    Pieces that are in `hidden` stand for a special token as plain text.
    """
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
        texts = [piece for piece in pieces if piece not in hidden]
        encoded = dict(processor(text=texts, return_tensors="pt", padding=len(texts) > 1, **media))
    except ValueError as error:
        raise VLBridgeError(f"the processor rejects {len(images)} images and {len(videos)} videos: {error}") from error
    if hidden:
        rows = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
        ids = (row[mask] for row, mask in rows)
        plain = {mark: torch.tensor(plain_ids(token, processor.tokenizer)) for mark, token in hidden.items()}
        encoded["input_ids"] = torch.cat([plain[piece] if piece in hidden else next(ids) for piece in pieces])[None]
    return encoded


def _no_supervised_token(
    messages: Conversation, excluded: Sequence[ExcludedTurn], skipped: Sequence[int]
) -> VLBridgeError:
    if not excluded and skipped:
        return VLBridgeError(
            f"no supervised token: {message_name(messages, skipped[-1])} and all other assistant messages have "
            '"train": false or are before the last user query; remove the conversation'
        )
    if not excluded:
        roles = ", ".join(message["role"] for message in messages)
        return VLBridgeError(
            f"no supervised token: none of the {len(messages)} messages has the role 'assistant' (roles: {roles})"
        )
    first = excluded[0]
    return VLBridgeError(
        "no supervised token: every assistant turn is excluded from the loss; "
        f"{message_name(messages, first.message)}: {first.reason}"
    )


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


def _special_tokens(processor: ProcessorMixin) -> list[str]:
    """The tokens that must not occur in a text."""
    tokenizer = processor.tokenizer
    missing = [token for token in (TURN_START, TURN_END) if token not in tokenizer.get_added_vocab()]
    if missing:
        raise VLBridgeError(f"tokenizer: expected the special token {missing[0]} of the ChatML format, found none")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*special, TURN_START, TURN_END, processor.image_token, processor.video_token]))


def _patch_dim(processor: ProcessorMixin) -> int:
    image_processor = processor.image_processor
    return len(image_processor.image_mean) * image_processor.temporal_patch_size * image_processor.patch_size**2
