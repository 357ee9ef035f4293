"""Which tokens of a conversation are learned, and what special tokens in its texts are."""

from dataclasses import dataclass

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
