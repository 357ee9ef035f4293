"""`vlbridge verify`."""

import argparse
import json
from dataclasses import asdict

from megatron_vlbridge.cli.arguments import add_experts, add_ignore, add_json
from megatron_vlbridge.cli.output import show
from megatron_vlbridge.errors import UsageError

SUMMARY = "compare two checkpoints bit for bit, or one with its own checksums"
DESCRIPTION = """Compare two checkpoints, each a Hugging Face or a Megatron folder, bit for bit.
With one folder that import or export wrote, compare its files with their
checksums. The exit code is 0 only if all is equal.

examples:
  vlbridge verify Qwen/Qwen3-VL-2B-Instruct qwen3-vl-2b-megatron
  vlbridge verify qwen3-vl-2b-megatron"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("a", metavar="A", help="a Hugging Face folder, Hub id or Megatron folder")
    parser.add_argument("b", metavar="B", nargs="?", help="another of either kind (default: A's own checksums)")
    add_experts(parser)
    add_ignore(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compare and report; gives the exit code."""
    from megatron_vlbridge.checkpoint.stream.checksums import verify_checksums
    from megatron_vlbridge.checkpoint.verify import first_lines, verify

    if args.b is None:
        if args.ignore or args.experts:
            raise UsageError("--ignore and --experts compare two checkpoints: expected A and B, found A alone")
        report = verify_checksums(args.a)
    else:
        report = verify(args.a, args.b, ignore=args.ignore, experts=args.experts)
    show(json.dumps({"equal": report.equal, **asdict(report)}) if args.json else "\n".join(first_lines(report)))
    return 0 if report.equal else 1
