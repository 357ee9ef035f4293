"""The arguments that name the conversations."""

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_vlbridge.data.conversations import FileConversation, read_conversations
from megatron_vlbridge.data.sources.meta import read_meta
from megatron_vlbridge.data.sources.mixture import open_data
from megatron_vlbridge.errors import VLBridgeError


def add_data_arguments(group: Any) -> None:
    """`--data`, or `--conversations` and `--valid-conversations`, and what a text may contain."""
    group.add_argument("--data", metavar="FILE", help="YAML with the sources of train and valid, or one source")
    group.add_argument("--conversations", help="JSON lines of {'messages': [...]}, images by path")
    group.add_argument("--valid-conversations", help="the same, for evaluation")
    group.add_argument("--literal-tags", action="store_true", help="take <image> and the like in texts as text")


def check_data_arguments(args: argparse.Namespace) -> None:
    """Check that the conversations are named once, and the file of `--data`; none at all is an error of the script.

    Raises VLBridgeError: `--data` stands beside the other arguments, or its file is invalid (see `meta.read_meta`).
    """
    if args.data is None:
        return
    given = {"--conversations": args.conversations, "--valid-conversations": args.valid_conversations}
    if both := [flag for flag, value in given.items() if value is not None]:
        raise VLBridgeError(f"--data {args.data} and {both[0]}: expected one of them; name all files in that of --data")
    splits = read_meta(args.data)
    if "train" not in splits and not args.skip_train:
        raise VLBridgeError(f"--data {args.data}: expected sources under 'train', found {', '.join(splits)}")


def open_conversations(args: argparse.Namespace, split: str) -> Sequence[FileConversation] | None:
    """The conversations of a split, "train" or "valid", that the arguments name; None if they name none.

    Raises VLBridgeError: see `mixture.open_data` and `conversations.read_conversations`.
    Example: `open_conversations(parse_arguments(), "train")`.
    """
    options = {"literal_tags": args.literal_tags, "cache": args.data_cache_path}
    if args.data is not None:
        return open_data(args.data, split, **options)
    file = args.conversations if split == "train" else args.valid_conversations
    if file is None:
        return None
    return read_conversations(file, split="train" if split == "train" else "validation", **options)
