"""`vlbridge export`."""

import argparse

from megatron_vlbridge.cli.arguments import size
from megatron_vlbridge.cli.conversion import add_options, convert

SUMMARY = "Megatron torch_dist checkpoint -> Hugging Face checkpoint"
DESCRIPTION = """Write the weights of a Megatron torch_dist checkpoint as a Hugging Face
checkpoint. Config, tokenizer and processor come from the import, or from the
folder that --like names.

example:
  vlbridge export run trained --like Qwen/Qwen3-VL-2B-Instruct"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "megatron_folder", metavar="MEGATRON_DIR", help="an imported folder, or what a training run saved"
    )
    parser.add_argument("hf_folder", metavar="HF_DIR", help="the result: a new or an empty folder")
    parser.add_argument(
        "--like", metavar="HF_DIR", help="the Hugging Face folder or Hub id that training started from (config, ...)"
    )
    parser.add_argument(
        "--max-shard-size", type=size, metavar="SIZE", help="such as 5GB (default: the source's shards)"
    )
    parser.add_argument(
        "--portable-config",
        action="store_true",
        help="write a config.json that transformers 4.57 and 5.x read alike (default: the source's, unchanged)",
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Plan and convert; gives the exit code."""
    from megatron_vlbridge.checkpoint.export_plan import ExportChoices, plan_export

    choices = ExportChoices(args.dtype, args.experts, args.max_shard_size, args.portable_config)
    return convert(args, plan_export(args.megatron_folder, args.hf_folder, args.like, choices))
