"""Conversations that fit into no pack are cut after one of their turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_vlbridge.data.conversations import FileConversation
from megatron_vlbridge.data.labels.options import LabelOptions, skipped_turns
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.lengths.table import LengthTable
from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.sources.lazy import LazySequence


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
        for end in _ends(conversation, measure.labels):
            row = measure([first_messages(conversation, end)], range(1)).rows[0]
            if row["tokens"] and fits(row):
                rows[index], kept[index] = row, end
                break
    return Truncation(TruncatedConversations(conversations, kept), replace(table, rows=rows), kept)


def _ends(conversation: Conversation, labels: LabelOptions) -> Iterator[int]:
    """How many messages a cut may leave, from most to fewest; the last is an assistant message to be learned."""
    for end in range(len(conversation) - 1, 0, -1):
        last = end - 1
        if conversation[last]["role"] == "assistant" and last not in skipped_turns(conversation[:end], labels):
            yield end


def first_messages(conversation: Conversation, count: int) -> Conversation:
    """The first messages of a conversation, with its tools and its place in a file.

    Example: `first_messages([{"role": "user", ...}, {"role": "assistant", ...}, {"role": "user", ...}], 2)`.
    """
    messages = conversation[:count]
    if isinstance(conversation, FileConversation):
        return FileConversation(messages, conversation.location, conversation.tools)
    return messages
