"""`vlbridge import`."""

import argparse

from megatron_vlbridge.cli.arguments import add_ignore
from megatron_vlbridge.cli.conversion import add_options, convert

SUMMARY = "Hugging Face checkpoint -> Megatron torch_dist checkpoint"
DESCRIPTION = """Write a Hugging Face checkpoint as a Megatron torch_dist checkpoint. It loads
with Megatron's --load and --pretrained-checkpoint at any parallel layout, and
keeps config, tokenizer and processor for the export.

example:
  vlbridge import Qwen/Qwen3-VL-2B-Instruct qwen3-vl-2b-megatron"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "hf_folder", metavar="HF_DIR", help="a Hugging Face folder, or a Hub id such as Qwen/Qwen3-VL-2B-Instruct"
    )
    parser.add_argument("megatron_folder", metavar="MEGATRON_DIR", help="the result: a new or an empty folder")
    add_options(parser)
    add_ignore(parser)


def run(args: argparse.Namespace) -> int:
    """Plan and convert; gives the exit code."""
    from megatron_vlbridge.checkpoint.import_plan import plan_import

    plan = plan_import(args.hf_folder, args.megatron_folder, dtype=args.dtype, experts=args.experts, ignore=args.ignore)
    return convert(args, plan)
