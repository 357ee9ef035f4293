"""Conversations that fit into no pack are cut after one of their turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_vlbridge.data.conversations import FileConversation
from megatron_vlbridge.data.labels.options import is_learned
from megatron_vlbridge.data.labels.turns import turn_groups
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.lengths.table import COLUMNS, LengthTable
from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.messages import message_parts
from megatron_vlbridge.data.processors.published import as_conversation_processor
from megatron_vlbridge.data.sources.lazy import LazySequence
from megatron_vlbridge.errors import VLBridgeError


class TruncatedConversations(LazySequence[Conversation]):
    """The `conversations`, of which those in `kept` have only their first `kept[index]` messages."""

    def __init__(self, conversations: Sequence[Conversation], kept: Mapping[int, int]) -> None:
        self.conversations = conversations
        self.kept = kept

    def __len__(self) -> int:
        return len(self.conversations)

    def item(self, index: int) -> Conversation:
        """The conversation at an index of at least 0."""
        conversation = self.conversations[index]
        return first_messages(conversation, self.kept[index]) if index in self.kept else conversation


@dataclass(frozen=True)
class Truncation:
    """The conversations and their lengths after the cut, and how many messages are `kept` of each that was cut."""

    conversations: TruncatedConversations
    table: LengthTable
    kept: dict[int, int]


def truncate(
    conversations: Sequence[Conversation],
    table: LengthTable,
    measure: Measure,
    indices: Sequence[int],
    fits: Callable[[np.void], bool],
) -> Truncation:
    """Cut each of the conversations `indices` after an assistant message: the last to be learned with which it fits.

    `fits` takes a row of a table of lengths. The media of the messages that are left out are left out with them. Where
    no cut both fits and leaves supervised tokens, the conversation stays as it is. The same arguments give the same
    cuts.

    Example: see `dataset.PackedConversations`, with `PackingOptions(too_long="truncate")`.
    """
    rows, kept = np.array(table.rows), dict[int, int]()
    for index in indices:
        conversation = conversations[index]
        least = _least_rows(conversation, measure)
        for end in _ends(conversation):
            if not fits(least[end]):
                continue
            row = measure([first_messages(conversation, end)], range(1)).rows[0]
            if row["tokens"] and fits(row):
                rows[index], kept[index] = row, end
                break
    return Truncation(TruncatedConversations(conversations, kept), replace(table, rows=rows), kept)


def _ends(conversation: Conversation) -> Iterator[int]:
    """How many messages a cut may leave, from most to fewest; the last is an assistant message to be learned."""
    for end in range(len(conversation) - 1, 0, -1):
        last = conversation[end - 1]
        if last["role"] == "assistant" and is_learned(last):
            yield end


def _least_rows(conversation: Conversation, measure: Measure) -> np.ndarray:
    """Of each number of first messages, the tokens and patches that they have in the whole conversation, as rows.

    A cut has at least as many, as templates write more of the last turn, such as its reasoning. So most cuts that do
    not fit need not be measured. Zeros if the conversation cannot be encoded.
    """
    rows = np.zeros(len(conversation) + 1, COLUMNS)
    try:
        sample = measure.encode(conversation)
    except VLBridgeError:
        return rows
    processor = as_conversation_processor(measure.processor)
    starts = processor.tokenizer.convert_tokens_to_ids(list(processor.turn_format.starts))
    ends = [*np.isin(sample.input_ids.numpy(), starts).nonzero()[0].tolist()[1:], len(sample.input_ids)]
    groups = turn_groups(conversation)
    for group, end in zip(groups, ends[-len(groups) :], strict=True):
        rows["tokens"][[message + 1 for message in group]] = end
    for kind, grids in (("image", sample.image_grid_thw), ("video", sample.video_grid_thw)):
        counts = [sum(part["type"] == kind for part in message_parts(message)) for message in conversation]
        patches = np.concatenate([[0], grids.prod(1).cumsum(0).numpy()])
        rows["patches"][1:] += patches[np.cumsum(counts)].astype(np.int32)
    return rows


def first_messages(conversation: Conversation, count: int) -> Conversation:
    """The first messages of a conversation, with its tools and its place in a file.

    Example: `first_messages([{"role": "user", ...}, {"role": "assistant", ...}, {"role": "user", ...}], 2)`.
    """
    messages = conversation[:count]
    if isinstance(conversation, FileConversation):
        return FileConversation(messages, conversation.location, conversation.tools)
    return messages
