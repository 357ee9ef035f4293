"""A processor of another kind, built from the facts about Kimi-K2.5.

Each role has a start token of its own; an image is `<|media_begin|>image<|media_content|><|media_pad|><|media_end|>`,
whose token the processor repeats before the text is tokenized; the temporal patch is one frame, and patches are
`[P, 3, size, size]`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from megatron_vlbridge.data.images import MediaOptions, read_image_size
from megatron_vlbridge.data.media import MediaShape, load_image
from megatron_vlbridge.data.processors.interface import ConversationProcessor, TurnFormat

TEMPLATE = """
{%- for message in messages -%}
{{- '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}
"""
STARTS = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>")
HEADER = "<|im_assistant|>assistant<|im_middle|>"
TOKENS = (
    *STARTS,
    "<|im_middle|>",
    "<|im_end|>",
    "<|media_begin|>",
    "<|media_content|>",
    "<|media_pad|>",
    "<|media_end|>",
)


class PreExpanded(ConversationProcessor):
    """Patches of 2 x 2 pixels, 2 x 2 of them merged to a token; images are padded to multiples of 4 pixels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in TOKENS])
        self.tokenizer = tokenizer
        self.turn_format = TurnFormat("other", STARTS, "<|im_middle|>", "<|im_end|>", HEADER)
        self.placeholders = {"image": "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"}
        self.media_tokens = {"image": "<|media_pad|>"}
        self.patch_shapes = {"image": (3, 2, 2)}

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False, **variables)

    def measure(self, part: dict[str, Any], options: MediaOptions) -> MediaShape:
        width, height = read_image_size(part["image"], "image", options)
        return MediaShape((1, 2 * math.ceil(height / 4), 2 * math.ceil(width / 4)), [])

    def expand(self, kind: str, shape: MediaShape) -> str:
        return self.media_tokens[kind] * (math.prod(shape.grid) // 4)

    def load(self, part: dict[str, Any], options: MediaOptions) -> Image.Image:
        return load_image(part, options)

    def encode(self, texts: Sequence[str], images: Sequence[Image.Image], videos: Sequence[Any]) -> dict[str, Any]:
        assert not videos
        patches, grids = [], []
        for image in images:
            pixels = np.asarray(image, dtype=np.float32)
            height, width = (4 * math.ceil(side / 4) for side in pixels.shape[:2])
            padded = np.zeros((height, width, 3), dtype=np.float32)
            padded[: pixels.shape[0], : pixels.shape[1]] = pixels
            patches.append(
                padded.reshape(height // 2, 2, width // 2, 2, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 2, 2)
            )
            grids.append([1, height // 2, width // 2])
        counts = iter(rows * columns // 4 for _, rows, columns in grids)
        expanded = [re.sub(r"<\|media_pad\|>", lambda match: match[0] * next(counts), text) for text in texts]
        ids = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in expanded]
        if not images:
            return {"input_ids": ids}
        pixel_values = torch.from_numpy(np.concatenate(patches))
        return {"input_ids": ids, "pixel_values": pixel_values, "image_grid_thw": torch.tensor(grids)}
