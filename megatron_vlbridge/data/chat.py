"""One conversation becomes tokens, the mask of the tokens to learn, and patches.

What the loss covers is read from the structure of the tokens: every turn is `<|im_start|>`, a header (the role and a
newline), content, `<|im_end|>`. No text is searched for, so no wording of a conversation can move the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from megatron_vlbridge.data.media import Conversation, Message, Video, load_image, load_video
from megatron_vlbridge.data.video_prompt import without_outer_pair
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.positions import check_vision_tokens

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Sample:
    """An encoded conversation of L tokens, n images and m videos.

    Attributes:
        input_ids: int64 `[L]`.
        loss_mask: bool `[L]`, True for a token that the model shall learn to say (not shifted).
        pixel_values: float32 `[P, patch_dim]`, the patches of all images in order; 0 rows where there is none.
        image_grid_thw: int64 `[n, 3]`, in patches.
        pixel_values_videos: float32 `[P, patch_dim]`.
        video_grid_thw: int64 `[m, 3]`.
    """

    input_ids: Tensor
    loss_mask: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    pixel_values_videos: Tensor
    video_grid_thw: Tensor


def encode_conversation(messages: Conversation, processor: ProcessorMixin, *, allow_no_loss: bool = False) -> Sample:
    """Encode a conversation in the Hugging Face messages format with a Qwen3-VL processor.

    A message is `{"role": "system" | "user" | "assistant", "content": ...}`; the content is a string or a list of
    `{"type": "text", "text": str}`, `{"type": "image", "image": path or PIL image}` and `{"type": "video", "video":
    frames, "fps": float}` (see `media.load_video`). The loss covers an assistant's content and its closing
    `<|im_end|>`. A token in which the tokenizer has merged the header's newline with content belongs to the content.

    Raises:
        VLBridgeError: a message is not of this form; a text holds a special token; the processor's tokens are not the
        turns of these
            messages; placeholders, grids, patches and media do not fit each other; no token would be learned (unless
            `allow_no_loss`).

    Example:
        >>> sample = encode_conversation([
        ...     {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Who?"}]},
        ...     {"role": "assistant", "content": "A cat."},
        ... ], processor)  # doctest: +SKIP
        >>> processor.decode(sample.input_ids[sample.loss_mask])  # doctest: +SKIP
        'A cat.<|im_end|>'
    """
    parts = _content_parts(messages, _special_tokens(processor))
    images = [load_image(part) for part in parts if part["type"] == "image"]
    videos = [load_video(part) for part in parts if part["type"] == "video"]
    encoded = _run_processor(messages, images, videos, processor)
    ids = encoded["input_ids"][0]
    loss_mask = _loss_mask(ids, messages, processor.tokenizer)
    if not allow_no_loss and not loss_mask.any():
        raise VLBridgeError(
            f"no token to learn: none of the {len(messages)} messages has the role 'assistant' (roles: "
            f"{_roles(messages)})"
        )
    empty = torch.zeros(0, _patch_dim(processor)), torch.zeros(0, 3, dtype=torch.int64)
    sample = Sample(
        ids,
        loss_mask,
        encoded.get("pixel_values", empty[0]),
        encoded.get("image_grid_thw", empty[1]),
        encoded.get("pixel_values_videos", empty[0]),
        encoded.get("video_grid_thw", empty[1]),
    )
    _check_media(sample, len(images), len(videos), processor)
    return sample


def _content_parts(messages: Conversation, special_tokens: Sequence[str]) -> list[dict[str, Any]]:
    """All content parts of all messages in order, after a check of their form."""
    if not messages:
        raise VLBridgeError("expected a conversation of at least one message, found none")
    parts: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        own = _message_parts(number, message)
        # Joined, as the template joins them: a special token may come about where two texts meet.
        text = "".join(part["text"] if part["type"] == "text" else "\n" for part in own)
        found = [token for token in special_tokens if token in text]
        if found:
            raise VLBridgeError(
                f"message {number} ({message['role']}): the text holds {', '.join(map(repr, found))}, which would be "
                "read as structure; remove special tokens from the text"
            )
        parts += own
    return parts


def _message_parts(number: int, message: Message) -> list[dict[str, Any]]:
    if message.get("role") not in ROLES or set(message) != {"role", "content"}:
        raise VLBridgeError(
            f"message {number}: expected the keys 'role' (one of {', '.join(ROLES)}) and 'content', "
            f"found keys {sorted(message)} and role {message.get('role')!r}"
        )
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise VLBridgeError(f"message {number}: expected content as a string or a list, found {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "video") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise VLBridgeError(
                f"message {number}: expected parts of type text (with a string under 'text'), image or video, found "
                f"{str(part)[:80]}"
            )
        if kind != "text" and message["role"] == "assistant":
            raise VLBridgeError(f"message {number} (assistant): expected text, as a model cannot say an {kind}")
    return content


def _run_processor(
    messages: Conversation, images: list[Image.Image], videos: list[Video], processor: ProcessorMixin
) -> dict[str, Tensor]:
    """The processor's own result for one conversation, as tensors with a leading axis of 1 where it adds one."""
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        few = processor.video_processor.temporal_patch_size
        for number, video in enumerate(videos):
            if len(video.frames) < few:
                raise VLBridgeError(f"video {number}: expected at least {few} frames, found {len(video.frames)}")
        media["videos"] = [video.frames for video in videos]
        media["video_metadata"] = [video.metadata for video in videos]
        media["do_sample_frames"] = False
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    try:
        return processor(text=[without_outer_pair(text, processor)], return_tensors="pt", **media)
    except ValueError as error:
        raise VLBridgeError(f"the processor refuses {len(images)} images and {len(videos)} videos: {error}") from error


def _loss_mask(ids: Tensor, messages: Conversation, tokenizer: Any) -> Tensor:
    """True on the content and the end of every assistant turn."""
    vocabulary = tokenizer.get_added_vocab()
    for token in (TURN_START, TURN_END):
        if token not in vocabulary:
            raise VLBridgeError(f"tokenizer: expected the special token {token} of a Qwen chat, found none")
    start_id, end_id = vocabulary[TURN_START], vocabulary[TURN_END]
    starts, ends = ((ids == token).nonzero().flatten().tolist() for token in (start_id, end_id))
    roles = [message["role"] for message in messages]
    if len(starts) == len(roles) + 1 and roles[0] != "system":
        roles = ["system", *roles]  # the chat template added its default system prompt
    if len(starts) != len(roles) or len(ends) != len(starts):
        raise VLBridgeError(
            f"expected one turn for each of the {len(messages)} messages ({_roles(messages)}), but the chat template "
            f"made {len(starts)} {TURN_START} and {len(ends)} {TURN_END}"
        )
    rest = tokenizer.decode(ids[ends[-1] + 1 :])
    if rest.strip():
        raise VLBridgeError(f"expected nothing but white space after the last {TURN_END}, found {rest[:80]!r}")
    mask = torch.zeros_like(ids, dtype=torch.bool)
    before = -1
    for number, (role, start, end) in enumerate(zip(roles, starts, ends, strict=True)):
        between = tokenizer.decode(ids[before + 1 : start])
        if not before < start < end or between.strip():
            raise VLBridgeError(
                f"turn {number} ({role}): expected tokens {start} ({TURN_START}) to {end} ({TURN_END}) after token "
                f"{before} with nothing but white space before, found {between!r}"
            )
        content = start + 1 + _header_tokens(ids[start + 1 : end], role, number, tokenizer)
        if role == "assistant":
            mask[content : end + 1] = True
        before = end
    return mask


def _header_tokens(turn: Tensor, role: str, number: int, tokenizer: Any) -> int:
    """How many tokens of a turn are its header and nothing else."""
    header = f"{role}\n"
    for count in range(1, min(len(turn), len(header)) + 1):
        text = tokenizer.decode(turn[:count])
        if text == header:
            return count
        if text.startswith(header):
            return count - 1
    raise VLBridgeError(
        f"turn {number}: expected the header {header!r}, found {tokenizer.decode(turn[: len(header)])!r}; the chat "
        "template does not have the Qwen form"
    )


def _check_media(sample: Sample, num_images: int, num_videos: int, processor: ProcessorMixin) -> None:
    """Media given, grids, patch rows and placeholders must all agree."""
    for kind, given, grid, pixels in (
        ("image", num_images, sample.image_grid_thw, sample.pixel_values),
        ("video", num_videos, sample.video_grid_thw, sample.pixel_values_videos),
    ):
        rows, width = int(grid.prod(1).sum()), _patch_dim(processor)
        if len(grid) != given or tuple(pixels.shape) != (rows, width):
            raise VLBridgeError(
                f"{given} {kind}s in the messages: expected as many grids and patches [{rows}, {width}], "
                f"found {len(grid)} grids {grid.tolist()} and patches {list(pixels.shape)}"
            )
    check_vision_tokens(
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
    return [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]


def _patch_dim(processor: ProcessorMixin) -> int:
    images = processor.image_processor
    return len(images.image_mean) * images.temporal_patch_size * images.patch_size**2


def _roles(messages: Conversation) -> str:
    return ", ".join(message["role"] for message in messages)
