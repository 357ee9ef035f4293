"""Which tokens of a conversation are learned, and what special tokens in its texts are."""

from dataclasses import dataclass

from megatron_vlbridge.data.media import Conversation, Message
from megatron_vlbridge.data.messages import message_text
from megatron_vlbridge.errors import VLBridgeError

LABEL_TURNS = ("all", "last")
SPECIAL_TOKENS = ("reject", "literal")


@dataclass(frozen=True)
class LabelOptions:
    """What is learned: `turns` is one of `LABEL_TURNS`, "last" for the assistant turns after the last user query.

    Results of tools are no query, nor is a user message that is one `<tool_response>...</tool_response>`. With
    `newline` the newline after the `<|im_end|>` of a learned turn is learned, too, as in Qwen's own fine-tuning script.
    `special_tokens` is one of `SPECIAL_TOKENS`: texts with a special token are rejected, or it is plain text.
    """

    turns: str = "all"
    newline: bool = False
    special_tokens: str = "reject"

    def __post_init__(self) -> None:
        for name, choices in (("turns", LABEL_TURNS), ("special_tokens", SPECIAL_TOKENS)):
            if getattr(self, name) not in choices:
                raise VLBridgeError(f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}")


def skipped_turns(messages: Conversation, options: LabelOptions) -> tuple[int, ...]:
    """The assistant messages that are not to be learned: `"train": false`, weight 0, or before the last user query.

    Example: of four messages, user and assistant in turn, `LabelOptions(turns="last")` skips `(1,)`.
    """
    first = -1
    if options.turns == "last":
        first = max((index for index, message in enumerate(messages) if _query(message)), default=-1)
    return tuple(
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and (index < first or not is_learned(message))
    )


def is_learned(message: Message) -> bool:
    """Whether an assistant message is to be learned where all turns are."""
    return bool(message.get("train", True)) and message.get("weight") != 0


def _query(message: Message) -> bool:
    """Whether a message is of the user, and not the result of a tool, as Qwen3.5's template decides it."""
    if message["role"] != "user":
        return False
    text = message_text(message, {"image": "x", "video": "x"}).strip()
    return not (text.startswith("<tool_response>") and text.endswith("</tool_response>"))
