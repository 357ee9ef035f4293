"""The arguments that say what is learned of a conversation."""

import argparse
from typing import Any

from megatron_vlbridge.data.labels.options import LABEL_TURNS, SPECIAL_TOKENS, LabelOptions


def add_label_arguments(group: Any) -> None:
    """`--label-turns`, `--label-newline` and `--special-tokens-in-text`."""
    group.add_argument(
        "--label-turns",
        choices=LABEL_TURNS,
        default="all",
        help="assistant turns that are learned: all, or those after the last user query (%(default)s)",
    )
    group.add_argument("--label-newline", action="store_true", help="also learn the newline after <|im_end|>")
    group.add_argument(
        "--special-tokens-in-text",
        choices=SPECIAL_TOKENS,
        default="reject",
        help="a special token in a text is an error, or encoded as plain text (%(default)s)",
    )


def label_options(args: argparse.Namespace) -> LabelOptions:
    """The options of `PackedConversations` that the arguments give."""
    return LabelOptions(args.label_turns, args.label_newline, args.special_tokens_in_text)
