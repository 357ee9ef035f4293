"""Which assistant turns are learned."""

from dataclasses import dataclass

from megatron_vlbridge.errors import VLBridgeError

LABEL_TURNS = ("all", "last")


@dataclass(frozen=True)
class LabelOptions:
    """What is learned: `turns` is one of `LABEL_TURNS`, "last" for the assistant turns after the last user query.

    Results of tools are no query, nor is a user message that is one `<tool_response>...</tool_response>`. With
    `newline` the newline after the `<|im_end|>` of a learned turn is learned, too, as in Qwen's own fine-tuning script.
    """

    turns: str = "all"
    newline: bool = False

    def __post_init__(self) -> None:
        if self.turns not in LABEL_TURNS:
            raise VLBridgeError(f"turns: expected one of {', '.join(LABEL_TURNS)}, found {self.turns!r}")
