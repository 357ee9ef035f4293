"""A conversation as the text that the chat template renders, before placeholders are expanded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.labels.special import (
    check_special_tokens,
    hide_special_tokens,
    plain_ids,
    shown_tokens,
    split_hidden,
)
from megatron_vlbridge.data.labels.template import check_reasoning, render, template_messages
from megatron_vlbridge.data.labels.tools import check_tools
from megatron_vlbridge.data.labels.turns import Turn, match_turns, split_turns
from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.messages import check_conversation, message_name, message_parts
from megatron_vlbridge.data.processors.interface import ConversationProcessor
from megatron_vlbridge.errors import VLBridgeError

SPECIAL_REMEDY = {
    "reject": "remove them, or encode them as plain text with --special-tokens-in-text literal",
    "literal": "write each of them in one part",
}


@dataclass(frozen=True)
class Prompt:
    """The `pieces` of a rendered conversation, with one placeholder token for each image and video, and its `turns`.

    A piece in `plain_tokens` stands for a special token as plain text, of which it has the ids.
    """

    pieces: list[str]
    turns: list[Turn]
    plain_tokens: dict[str, Tensor]

    @property
    def texts(self) -> list[str]:
        """The pieces that are text."""
        return [piece for piece in self.pieces if piece not in self.plain_tokens]

    def join(self, ids: Sequence[Tensor]) -> Tensor:
        """The tokens `[L]` of all pieces, given those of each of `texts`."""
        left = iter(ids)
        return torch.cat(
            [self.plain_tokens[piece] if piece in self.plain_tokens else next(left) for piece in self.pieces]
        )


def make_prompt(
    messages: Conversation, processor: ConversationProcessor, tools: Sequence[dict[str, Any]], labels: LabelOptions
) -> Prompt:
    """Check a conversation and apply the chat template (for the errors see `chat.encode_conversation`)."""
    check_conversation(messages)
    _check_kinds(messages, processor)
    tools = list(tools)
    check_tools(tools)
    written, special = template_messages(messages), special_tokens_of(processor)
    hidden: dict[str, str] = {}
    if labels.special_tokens == "literal":
        written, tools, hidden = hide_special_tokens(written, tools, special)
    check_special_tokens(written, tools, special, SPECIAL_REMEDY[labels.special_tokens])
    check_reasoning(messages, processor)
    text = render(written, processor, **({"tools": tools} if tools else {}))
    turns = match_turns(split_turns(text, processor.turn_format), written, processor.placeholders, tools)
    return Prompt(
        split_hidden(text, hidden),
        [Turn(turn.role, shown_tokens(turn.content, hidden)) for turn in turns],
        {mark: torch.tensor(plain_ids(token, processor.tokenizer)) for mark, token in hidden.items()},
    )


def special_tokens_of(processor: ConversationProcessor) -> list[str]:
    """The tokens that must not occur in a text."""
    tokenizer, turns = processor.tokenizer, processor.turn_format
    missing = [token for token in (*turns.starts, turns.end) if token not in tokenizer.get_added_vocab()]
    if missing:
        raise VLBridgeError(
            f"tokenizer: expected the special token {missing[0]} of the {turns.name} format, found none"
        )
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*special, *turns.starts, turns.end, *processor.media_tokens.values()]))


def _check_kinds(messages: Conversation, processor: ConversationProcessor) -> None:
    """Check that the processor has the kinds of media of the messages."""
    kinds = ("text", *processor.placeholders)
    for index, message in enumerate(messages):
        for part_index, part in enumerate(message_parts(message)):
            if part["type"] not in kinds:
                raise VLBridgeError(
                    f"{message_name(messages, index)}, part {part_index}: expected {' or '.join(kinds)}, found "
                    f"{part['type']}, which {type(processor).__name__} does not encode; leave it out"
                )
