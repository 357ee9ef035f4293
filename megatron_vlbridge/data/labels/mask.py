"""The loss mask of an encoded conversation, and the turns that it leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import ProcessorMixin

from megatron_vlbridge.data.labels.options import LabelOptions, skipped_turns
from megatron_vlbridge.data.labels.turns import ExcludedTurn, Turn, add_newlines, supervised_mask
from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.messages import message_name
from megatron_vlbridge.errors import VLBridgeError


@dataclass(frozen=True, eq=False)
class LossMask:
    """`supervised` is bool `[L]`; `excluded_turns` and `skipped_turns` as in `chat.Sample`."""

    supervised: Tensor
    excluded_turns: tuple[ExcludedTurn, ...]
    skipped_turns: tuple[int, ...]


def loss_mask(
    ids: Tensor,
    turns: Sequence[Turn],
    messages: Conversation,
    processor: ProcessorMixin,
    labels: LabelOptions,
    *,
    allow_no_loss: bool,
) -> LossMask:
    """The loss mask of the tokens `ids` int64 `[L]` of `messages`, each rendered as one of `turns`.

    Raises VLBridgeError: there is no supervised token, unless `allow_no_loss`.
    """
    skipped = skipped_turns(messages, labels)
    supervised, excluded = supervised_mask(ids, turns, messages, processor, skipped)
    if labels.newline:
        add_newlines(supervised, ids, processor)
    if not allow_no_loss and not supervised.any():
        raise _no_supervised_token(messages, excluded, skipped)
    return LossMask(supervised, excluded, skipped)


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
