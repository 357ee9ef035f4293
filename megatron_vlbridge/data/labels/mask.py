"""The loss mask of an encoded conversation, and the turns that it leaves out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlbridge.data.labels.options import LabelOptions, skipped_turns
from megatron_vlbridge.data.labels.turns import ExcludedTurn, Turn, supervised_spans, with_newlines
from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.messages import message_name, message_text
from megatron_vlbridge.data.processors.interface import ConversationProcessor
from megatron_vlbridge.errors import VLBridgeError


@dataclass(frozen=True, eq=False)
class LossMask:
    """`supervised` is bool `[L]`, the rest as in `chat.Sample`."""

    supervised: Tensor
    weights: Tensor | None
    excluded_turns: tuple[ExcludedTurn, ...]
    skipped_turns: tuple[int, ...]


def loss_mask(
    ids: Tensor,
    turns: Sequence[Turn],
    messages: Conversation,
    processor: ConversationProcessor,
    labels: LabelOptions,
    *,
    allow_no_loss: bool,
) -> LossMask:
    """The loss mask of the tokens `ids` int64 `[L]` of `messages`, each rendered as one of `turns`.

    Raises VLBridgeError, unless `allow_no_loss`: there is no supervised token, or of a turn only its end.
    """
    skipped = skipped_turns(messages, labels)
    spans, excluded = supervised_spans(ids, turns, messages, processor, skipped)
    if not allow_no_loss:
        if not spans:
            raise _no_supervised_token(messages, excluded, skipped)
        _check_not_blank(messages, spans)
    if labels.newline:
        spans = with_newlines(spans, ids, processor)
    weights = torch.zeros(len(ids))
    values = weights.numpy()  # slices of arrays are several times faster
    for message, span in spans.items():
        values[span] = messages[message].get("weight", 1)
    weighted = any(messages[message].get("weight", 1) != 1 for message in spans)
    return LossMask(weights > 0, weights if weighted else None, excluded, skipped)


def _check_not_blank(messages: Conversation, spans: Mapping[int, slice]) -> None:
    """Reject answers of which only the end would be learned: the model would end its turn at once."""
    for index, span in spans.items():
        message = messages[index]
        text = message_text(message, {})
        is_blank = not text or text.isspace()
        says_more = message.get("reasoning_content") or message.get("tool_calls")
        if (is_blank and not says_more) or span.stop - span.start == 1:
            raise VLBridgeError(
                f"{message_name(messages, index)}: expected an answer to learn, found {text!r}; write it, remove the "
                'message, or give it "train": false'
            )


def _no_supervised_token(
    messages: Conversation, excluded: Sequence[ExcludedTurn], skipped: Sequence[int]
) -> VLBridgeError:
    if not excluded and skipped:
        return VLBridgeError(
            f"no supervised token: {message_name(messages, skipped[-1])} and all other assistant messages have "
            '"train": false, the weight 0, or are before the last user query; remove the conversation'
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
