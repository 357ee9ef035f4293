"""The `vlbridge` command: arguments and exit codes, no logic.

Exit codes: 0 done, 1 an unfit input was found, 2 wrong usage.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.errors import VLBridgeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "import":
            done = import_checkpoint(args.hf_folder, args.megatron_folder, dtype=args.dtype)
        else:
            done = export_checkpoint(args.megatron_folder, args.hf_folder, like=args.like, dtype=args.dtype)
    except VLBridgeError as error:
        print(f"vlbridge {args.command}: {error}", file=sys.stderr)
        return 1
    print(done)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlbridge", description="Qwen-VL checkpoints: Hugging Face <-> Megatron-Core")
    commands = parser.add_subparsers(dest="command", required=True)
    dtype = argparse.ArgumentParser(add_help=False)
    dtype.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="convert all weights (default: keep)"
    )
    read = commands.add_parser("import", parents=[dtype], help="Hugging Face folder -> Megatron torch_dist folder")
    read.add_argument("hf_folder")
    read.add_argument("megatron_folder", help="must not exist")
    write = commands.add_parser("export", parents=[dtype], help="Megatron torch_dist folder -> Hugging Face folder")
    write.add_argument("megatron_folder", help="an imported folder, or what a training run saved")
    write.add_argument("hf_folder", help="must not exist")
    write.add_argument("--like", help="the Hugging Face folder that training started from (config, processor, ...)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
