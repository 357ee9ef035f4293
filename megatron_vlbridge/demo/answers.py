"""Ask a model the held-out questions; here transformers, and in `ask_megatron.py` Megatron."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin

from megatron_vlbridge.data.media import Conversation, load_video
from megatron_vlbridge.data.video_prompt import without_outer_pair
from megatron_vlbridge.demo.digits import answer, blank, images_of, question, videos_of

# The longest answer has two words and the end of the turn.
MAX_NEW_TOKENS = 4
CONVERSATIONS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model answers, greedily, in n conversations of T tokens in total, with the images and with blanked ones.

    `logits` float32 `[T, V]` are those of all tokens of the conversations, the expected answers included.
    """

    texts: tuple[str, ...]
    texts_blind: tuple[str, ...]
    logits: Tensor

    def save(self, path: Path) -> None:
        """Write to a file that `load` reads."""
        texts = {"texts": json.dumps(self.texts), "texts_blind": json.dumps(self.texts_blind)}
        save_file({"logits": self.logits.contiguous()}, path, metadata=texts)

    @classmethod
    def load(cls, path: Path) -> "Answers":
        """What `save` wrote."""
        with safe_open(path, framework="pt") as file:
            texts = file.metadata()
            return cls(
                tuple(json.loads(texts["texts"])), tuple(json.loads(texts["texts_blind"])), file.get_tensor("logits")
            )


@torch.inference_mode()
def ask_transformers(folder: Path, conversations: Sequence[Conversation]) -> Answers:
    """Load a Hugging Face checkpoint as any user of transformers does, and ask it."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(batch: BatchFeature) -> Tensor:
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        return tokens[:, batch["input_ids"].shape[1] :]

    return ask(conversations, processor, lambda batch: model(**batch).logits, generate)


def ask(
    conversations: Sequence[Conversation],
    processor: ProcessorMixin,
    forward: Callable[[BatchFeature], Tensor],
    generate: Callable[[BatchFeature], Tensor],
) -> Answers:
    """Ask a model, given as two functions of a batch `[B, S]` padded on the left.

    `forward` gives logits `[B, S, V]`, `generate` the next tokens `[B, n]`, which are ignored after the end of the
    turn.
    """

    def answers(asked: Sequence[Conversation]) -> tuple[str, ...]:
        texts: list[str] = []
        for some in batched(asked, CONVERSATIONS_AT_ONCE):
            batch = _encode([question(one) for one in some], processor, True)
            texts += [_text(tokens, processor) for tokens in generate(batch).tolist()]
        return tuple(texts)

    logits = []
    for some in batched(conversations, CONVERSATIONS_AT_ONCE):
        batch = _encode(some, processor, False)
        logits.append(forward(batch)[batch["attention_mask"].bool()])
    return Answers(answers(conversations), answers([blank(one) for one in conversations]), torch.cat(logits))


def accuracy(texts: Sequence[str], conversations: Sequence[Conversation]) -> float:
    """The fraction of conversations that were answered in exactly the expected words, 0 to 1."""
    right = sum(text == answer(one) for text, one in zip(texts, conversations, strict=True))
    return right / len(conversations)


def _encode(conversations: Sequence[Conversation], processor: ProcessorMixin, prompt: bool) -> BatchFeature:
    texts = [processor.apply_chat_template(one, add_generation_prompt=prompt) for one in conversations]
    images = [image for one in conversations for image in images_of(one)]
    videos = [load_video(part) for one in conversations for part in videos_of(one)]
    media: dict[str, Any] = {"images": images} if images else {}
    if videos:
        media |= {"videos": [video.frames for video in videos], "do_sample_frames": False}
        media["video_metadata"] = [video.metadata for video in videos]
    return processor(
        text=[without_outer_pair(text, processor) for text in texts],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **media,
    )


def _text(tokens: list[int], processor: ProcessorMixin) -> str:
    end = processor.tokenizer.eos_token_id
    return processor.decode(tokens[: tokens.index(end)] if end in tokens else tokens)
