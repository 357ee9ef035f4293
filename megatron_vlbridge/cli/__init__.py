"""The `vlbridge` command: arguments, progress and exit codes, no logic. Its help imports no torch.

Exit codes: 0 done, 1 a difference or an invalid input was found, 2 wrong usage, 130 interrupted.
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence

from megatron_vlbridge.cli.output import flush, open_closed_streams, show
from megatron_vlbridge.cli.parser import make_parser, parse
from megatron_vlbridge.errors import UsageError, VLBridgeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code.

    Raises SystemExit with 2 for wrong usage and with 0 after `--help`.
    Example: `main(["inspect", "Qwen3-VL-2B-Instruct"])`.
    """
    open_closed_streams()
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
    except SystemExit:
        flush()  # the reader of a help text may be gone
        raise
    if args.version:
        others = ", ".join(f"{name} {_version(name)}" for name in ("megatron-core", "torch", "transformers"))
        show(f"vlbridge {_version('megatron-vlbridge')} ({others})")
        return 0
    if args.command is None:
        show(make_parser([])[0].format_help(), stream=sys.stderr)
        return 2
    return _run(args)


def _version(name: str) -> str:
    """The version of a package, which is not imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _run(args: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        return _call(command, args)
    except VLBridgeError as error:
        if args.json:
            mismatches = getattr(error, "mismatches", {})
            show(json.dumps({"error": str(error), "mismatches": mismatches, "misfits": mismatches}))  # the former name
        else:
            show(f"vlbridge {args.command}: {error}", stream=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        kept = "; what is finished is kept for --resume" if hasattr(args, "resume") else ""
        if getattr(args, "action", None) == "index":
            kept = "; what is finished is kept: run it again to go on"
        show(f"vlbridge {args.command}: interrupted{kept}", stream=sys.stderr)
        return 130


def _call(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; a file that the system refuses, such as one with a name that is too long, is an invalid input."""
    try:
        return command(args)
    except OSError as error:
        if error.filename is None:
            raise
        raise VLBridgeError(f"{error.filename}: {error.strerror}") from error
