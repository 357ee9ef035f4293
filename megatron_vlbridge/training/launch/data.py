"""The arguments that name the conversations."""

import argparse
from typing import Any

from megatron.core import parallel_state

from megatron_vlbridge.data.conversations import FileConversations, read_conversations
from megatron_vlbridge.data.lengths.fingerprint import open_table, table_path
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.lengths.table import LengthTable
from megatron_vlbridge.data.sources.meta import read_meta
from megatron_vlbridge.data.sources.mixture import Mixture, open_data
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.console import note

MANY = 10_000
"""Conversations that are many to measure at each start."""


def add_data_arguments(group: Any) -> None:
    """`--data`, or `--conversations` and `--valid-conversations`, and what a text may contain."""
    group.add_argument("--data", metavar="FILE", help="YAML with the sources of train and valid, or one source")
    group.add_argument("--conversations", help="JSON lines of {'messages': [...]}, images by path")
    group.add_argument("--valid-conversations", help="the same, for evaluation")
    group.add_argument(
        "--max-bad-samples",
        type=float,
        default=0,
        metavar="SHARE",
        help="share of the conversations that may fail; they are left out or replaced, and logged (%(default)s)",
    )
    group.add_argument("--literal-tags", action="store_true", help="take <image> and the like in texts as text")


def check_data_arguments(args: argparse.Namespace) -> None:
    """Check that the conversations are named once, and the file of `--data`; none at all is an error of the script.

    Raises VLBridgeError: `--data` stands beside the other arguments, its file is invalid (see `meta.read_meta`), or
    `--max-bad-samples` is not a share.
    """
    if not 0 <= args.max_bad_samples < 1:
        raise VLBridgeError(f"--max-bad-samples: expected a share from 0 to below 1, found {args.max_bad_samples}")
    if args.data is None:
        return
    given = {"--conversations": args.conversations, "--valid-conversations": args.valid_conversations}
    if both := [flag for flag, value in given.items() if value is not None]:
        raise VLBridgeError(f"--data {args.data} and {both[0]}: expected one of them; name all files in that of --data")
    splits = read_meta(args.data)
    if "train" not in splits and not args.skip_train:
        raise VLBridgeError(f"--data {args.data}: expected sources under 'train', found {', '.join(splits)}")


def data_file(args: argparse.Namespace, split: str) -> str | None:
    """The file that names the conversations of a split, "train" or "valid"; None if there is none."""
    file: str | None = args.conversations if split == "train" else args.valid_conversations
    return args.data or file


def open_lengths(
    args: argparse.Namespace, split: str, conversations: FileConversations | Mixture, measure: Measure
) -> LengthTable | None:
    """The table of lengths beside the data file; None if there is none, so that all conversations are measured.

    Raises VLBridgeError: it was made for other data or settings.
    """
    file = data_file(args, split)
    if file is None:
        return None
    table = open_table(file, split, conversations, measure)
    if table is None and len(conversations) >= MANY:
        count = f"{len(conversations):,} conversations of {split} are measured now, as {table_path(file, split)} is"
        note(f"data     {count} missing; to do it once: vlbridge data index {file}")
    return table


def decodes_media(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Whether the datasets of this rank's (virtual) pipeline stage decode images and videos.

    That is the stage of the vision tower. With `--max-bad-samples` it is every stage: an image that cannot be decoded
    is replaced in its pack, which must be the same on all of them.

    Example: `PackedConversations(..., decode_media=decodes_media(args, vp_stage))` in a dataset provider.
    """
    return _has_tower(vp_stage) or args.max_bad_samples > 0


def logs_data(vp_stage: int | None) -> bool:
    """Whether the datasets of this rank's (virtual) pipeline stage log what they leave out and replace.

    Of those that read the same packs it is the first one.
    """
    return _has_tower(vp_stage) and parallel_state.get_context_parallel_rank() == 0


def _has_tower(vp_stage: int | None) -> bool:
    return bool(parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage))


def open_conversations(args: argparse.Namespace, split: str) -> FileConversations | Mixture | None:
    """The conversations of a split, "train" or "valid", that the arguments name; None if they name none.

    Raises VLBridgeError: see `mixture.open_data` and `conversations.read_conversations`.
    Example: `open_conversations(parse_arguments(), "train")`.
    """
    options = {"literal_tags": args.literal_tags, "cache": args.data_cache_path}
    if args.data is not None:
        return open_data(args.data, split, **options)
    file = data_file(args, split)
    if file is None:
        return None
    return read_conversations(file, split="train" if split == "train" else "validation", **options)
