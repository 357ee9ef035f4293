"""The sizes of conversations, from the headers of their media files."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from megatron_vlbridge.data.chat import DEFAULT_LABELS, MeasuredConversation, measure_conversation
from megatron_vlbridge.data.conversations import FileConversation
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.lengths.table import COLUMNS, LengthTable, Note
from megatron_vlbridge.data.media import DEFAULTS, Conversation
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.balance import frame_work


@dataclass(frozen=True)
class Measure:
    """Measures conversations for a processor, and a vision tower of `hidden_size`.

    A conversation that cannot be encoded has 0 tokens; `first_failed` of the table says where and why.

    Example: `Measure(processor, config.vision.hidden_size)(conversations, range(10)).rows["tokens"]`.
    """

    processor: ProcessorMixin
    hidden_size: int
    media: MediaOptions = DEFAULTS
    labels: LabelOptions = DEFAULT_LABELS

    def __call__(self, conversations: Sequence[Conversation], indices: range) -> LengthTable:
        """The table of the conversations with these indices, in this order."""
        with _one_thread():
            return self._measure(conversations, indices)

    def encode(self, conversation: Conversation, index: int = 0) -> MeasuredConversation:
        """A conversation without its patches; errors name its file and line, or its index."""
        return encode_located(
            measure_conversation, conversation, index, self.processor, media=self.media, labels=self.labels
        )

    def _measure(self, conversations: Sequence[Conversation], indices: range) -> LengthTable:
        rows = np.zeros(len(indices), COLUMNS)
        excluded: list[Note] = []
        failed: list[Note] = []
        for place, index in enumerate(indices):
            try:
                conversation = conversations[index]
            except VLBridgeError as error:
                failed.append(Note(place, str(error)))
                continue
            try:
                sample = self.encode(conversation, index)
            except VLBridgeError as error:
                failed.append(Note(place, str(error)))
                continue
            grids = [*sample.image_grid_thw.tolist(), *sample.video_grid_thw.tolist()]
            rows[place] = (
                len(sample.input_ids),
                sum(math.prod(grid) for grid in grids),
                sum(frames * frame_work(height * width, self.hidden_size) for frames, height, width in grids),
                sum(message["role"] == "assistant" for message in conversation),
                len(sample.excluded_turns),
                len(sample.skipped_turns),
            )
            if sample.excluded_turns and not excluded:
                excluded.append(Note(place, f"{location(conversation, index)}, {sample.excluded_turns[0]}"))
        return LengthTable(rows, excluded[0] if excluded else None, failed[0] if failed else None)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for the operations of torch, whose tensors are small here: more wait for each other, busily."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encode_located[T](
    encode: Callable[..., T], conversation: Conversation, index: int, *args: Any, **options: Any
) -> T:
    """Call `encode` with a conversation and its tools; errors name its file and line, or its index."""
    try:
        return encode(conversation, *args, tools=tools_of(conversation), **options)
    except VLBridgeError as error:
        raise VLBridgeError(f"{location(conversation, index)}: {error}") from error


def location(conversation: Conversation, index: int) -> str:
    """How errors name a conversation: its file and line, or its index."""
    return conversation.location if isinstance(conversation, FileConversation) else f"conversation {index}"


def tools_of(conversation: Conversation) -> Sequence[dict[str, object]]:
    """The tools of a conversation that was read from a file."""
    return conversation.tools if isinstance(conversation, FileConversation) else ()
