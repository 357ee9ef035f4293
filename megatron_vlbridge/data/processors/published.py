"""The processors of `families.processors`, adapted to the interface of `processors.interface`."""

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.media import (
    Conversation,
    MediaShape,
    Size,
    Video,
    image_size,
    load_image,
    load_video,
    media_shape,
    placeholder_text,
)
from megatron_vlbridge.data.media_tokens import check_ratio
from megatron_vlbridge.data.processors.interface import CHATML, ConversationProcessor
from megatron_vlbridge.data.processors.item_sizes import with_sizes
from megatron_vlbridge.data.processors.runs import RunTokenizer
from megatron_vlbridge.data.video_prompt import without_outer_pair
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.processors import IMAGE_PROCESSORS, VIDEO_PROCESSORS
from megatron_vlbridge.layout.positions import block_starts
from megatron_vlbridge.layout.vision_items import VisionItems


def as_conversation_processor(processor: ProcessorMixin | ConversationProcessor) -> ConversationProcessor:
    """The processor itself if it has the interface, or a published one adapted to it.

    Raises VLBridgeError: its image or video processor is not in `families.processors`.
    """
    if isinstance(processor, ConversationProcessor):
        return processor
    for name, known in (("image_processor", IMAGE_PROCESSORS), ("video_processor", VIDEO_PROCESSORS)):
        found = type(getattr(processor, name, None)).__name__
        if found not in known:
            raise VLBridgeError(
                f"processor {type(processor).__name__}: expected the {name} {' or '.join(sorted(known))}, found "
                f"{found}; write a subclass of data.processors.interface.ConversationProcessor"
            )
    template, tokenizer = str(processor.chat_template), processor.tokenizer
    if "strftime_now" in template:
        return PublishedProcessor(processor)
    return _published(processor, tokenizer, template, len(tokenizer), str(tokenizer.special_tokens_map))


# Of each processor and what its template can read of it: generation prompts are rendered once for each.
@lru_cache(maxsize=16)
def _published(
    processor: ProcessorMixin, _tokenizer: PreTrainedTokenizerBase, _template: str, _tokens: int, _special: str
) -> "PublishedProcessor":
    return PublishedProcessor(processor)


class LoadedImage(NamedTuple):
    """An image, and the size to which it is resized."""

    image: Image.Image
    size: Size


class PublishedProcessor(ConversationProcessor):
    """A processor of transformers: ChatML, placeholders expanded by the processor, timestamps in the text."""

    turn_format = CHATML

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        # The processor class of Qwen2.5-VL does not have these attributes.
        start, end = (getattr(processor, f"vision_{name}_token", f"<|vision_{name}|>") for name in ("start", "end"))
        self.media_tokens = {"image": processor.image_token, "video": processor.video_token}
        image, video = (f"{start}{token}{end}" for token in self.media_tokens.values())
        self.placeholders = {"image": image, "video": without_outer_pair(video, processor)}
        part = processor.image_processor
        width = len(part.image_mean) * part.temporal_patch_size * part.patch_size**2
        self.patch_shapes = {"image": (width,), "video": (width,)}
        template = processor.chat_template
        template = template.get("default", "") if isinstance(template, dict) else template
        thinking = [{"enable_thinking": True}, {"enable_thinking": False}]
        self.prompt_variables = [{}, *(thinking if "enable_thinking" in (template or "") else [])]

    def render(self, messages: Conversation, **variables: Any) -> str:
        """The text of the processor's chat template, with one token for a video."""
        text = self.processor.apply_chat_template(messages, tokenize=False, **variables)
        return without_outer_pair(text, self.processor)

    def measure(self, part: dict[str, Any], options: MediaOptions) -> MediaShape:
        """See `media.media_shape`."""
        return media_shape(part, self.processor, options)

    def expand(self, kind: str, shape: MediaShape) -> str:
        """See `media.placeholder_text`."""
        return placeholder_text(kind, shape, self.processor)

    def load(self, part: dict[str, Any], options: MediaOptions) -> LoadedImage | Video:
        """See `media.load_image` and `media.load_video`."""
        if part["type"] == "image":
            image = load_image(part, options)
            check_ratio("image", *image.size)
            return LoadedImage(image, image_size(part, self.processor.image_processor, options))
        video = load_video(part, options, self.processor.video_processor)
        minimum, (count, _, height, width) = self.processor.video_processor.temporal_patch_size, video.frames.shape
        if count < minimum:
            raise VLBridgeError(f"video: expected at least {minimum} frames, found {count}")
        check_ratio("video", width, height)
        return video

    def encode(self, texts: Sequence[str], images: Sequence[LoadedImage], videos: Sequence[Video]) -> dict[str, Any]:
        """Call the processor (VLBridgeError if it rejects the media)."""
        media: dict[str, Any] = {}
        if images:
            media["images"] = [image.image for image in images]
        if videos:
            media["videos"] = [video.frames for video in videos]
            media["video_metadata"] = [video.metadata for video in videos]
            media["do_sample_frames"] = False
        processor = copy.copy(self.processor)
        processor.tokenizer = RunTokenizer(self.tokenizer, list(self.media_tokens.values()))
        sized = with_sizes(processor, [image.size for image in images], [video.size for video in videos])
        try:
            encoded = dict(sized(text=list(texts), return_tensors="pt", padding=len(texts) > 1, **media))
        except ValueError as error:
            raise VLBridgeError(
                f"the processor rejects {len(images)} images and {len(videos)} videos: {error}"
            ) from error
        if len(texts) == 1:
            return encoded | {"input_ids": [encoded["input_ids"][0]]}
        rows = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
        return encoded | {"input_ids": [row[mask] for row, mask in rows]}

    def check_tokens(self, ids: Tensor, grids: Mapping[str, Tensor]) -> None:
        """Check each image and video by its own tokens (see `layout.positions.mrope_positions`)."""
        merge_size, ends = self.processor.image_processor.merge_size, torch.tensor([len(ids)])
        for kind, token in (("image", self.processor.image_token_id), ("video", self.processor.video_token_id)):
            counts, placeholders = torch.tensor([len(grids[kind])]), ids == token
            if counts.any() or placeholders.any():
                block_starts(VisionItems(kind, grids[kind], merge_size), placeholders, ends, counts)
