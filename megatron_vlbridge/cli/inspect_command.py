"""`vlbridge inspect`."""

import argparse
import json

from megatron_vlbridge.cli.arguments import add_json, count
from megatron_vlbridge.cli.output import show

SUMMARY = "show what a checkpoint holds"
DESCRIPTION = """Show what a checkpoint holds: its architecture, parameters by part, dtypes and
tensors, and with --pp how its decoder layers split over pipeline stages. Only
headers are read.

example:
  vlbridge inspect Qwen/Qwen3-VL-2B-Instruct --pp 4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folder", metavar="DIR", help="a Hugging Face folder, Hub id or Megatron folder")
    parser.add_argument(
        "--pp",
        type=count,
        metavar="N",
        help="show the layers of N pipeline stages, with Megatron's arguments for it",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Inspect and print; gives the exit code."""
    from megatron_vlbridge.checkpoint.inspect import inspect, table_lines

    found = inspect(args.folder)
    show(json.dumps(found.as_json(args.pp)) if args.json else "\n".join(table_lines(found, args.pp)))
    return 0
