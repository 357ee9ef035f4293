"""The arguments of packing."""

import argparse
from typing import Any

from megatron_vlbridge.data.packing.offline import PACKINGS, TOO_LONG, PackingOptions
from megatron_vlbridge.errors import VLBridgeError


def add_packing_arguments(group: Any) -> None:
    """`--packing`, what it needs, and `--long-conversations`."""
    group.add_argument("--packing", choices=PACKINGS, default="best-fit", help="how packs are filled (%(default)s)")
    group.add_argument("--max-patches-per-pack", type=int, help="first-fit-decreasing: limit on vision patches")
    group.add_argument("--pack-window", type=int, help="first-fit-decreasing: conversations packed together (all)")
    group.add_argument(
        "--pack-neighbors", type=int, default=1, help="first-fit-decreasing: packs of like vision work in a row"
    )
    group.add_argument(
        "--long-conversations", choices=TOO_LONG, default="error", help="those that fit into no pack (%(default)s)"
    )


def packing_options(args: argparse.Namespace) -> PackingOptions:
    """The options of `PackedConversations` that the arguments give.

    Raises VLBridgeError: an argument needs another `--packing`.
    """
    given = {
        "--max-patches-per-pack": args.max_patches_per_pack is not None,
        "--pack-window": args.pack_window is not None,
        "--pack-neighbors": args.pack_neighbors > 1,
    }
    unused = [flag for flag, is_given in given.items() if is_given]
    if args.packing == "best-fit" and unused:
        raise VLBridgeError(f"{', '.join(unused)}: needs --packing first-fit-decreasing, found --packing best-fit")
    return PackingOptions(
        args.packing, args.max_patches_per_pack, args.pack_window, args.pack_neighbors, args.long_conversations
    )
