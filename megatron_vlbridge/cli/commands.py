"""The commands of `vlbridge`: what each takes, and what it calls."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

from megatron_vlbridge.cli import data
from megatron_vlbridge.cli.arguments import add_experts, add_ignore, add_json, count, size
from megatron_vlbridge.cli.conversion import add_options, add_run_options, convert
from megatron_vlbridge.cli.output import show
from megatron_vlbridge.errors import UsageError


class Command(NamedTuple):
    """A command: its help, its arguments, and the function that runs it and gives the exit code."""

    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "hf_folder", metavar="HF_DIR", help="a Hugging Face folder, or a Hub id such as Qwen/Qwen3-VL-2B-Instruct"
    )
    parser.add_argument("megatron_folder", metavar="MEGATRON_DIR", help="the result: a new or an empty folder")
    add_options(parser)
    add_ignore(parser)


def _run_import(args: argparse.Namespace) -> int:
    from megatron_vlbridge.checkpoint.import_plan import plan_import

    plan = plan_import(args.hf_folder, args.megatron_folder, dtype=args.dtype, experts=args.experts, ignore=args.ignore)
    return convert(args, plan)


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--fp8", action="store_true", help="write linear layers in FP8, with a scale for each block of 128 x 128"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapters that a run with --lora-rank saved, for peft"
    )
    add_options(parser)


def _run_export(args: argparse.Namespace) -> int:
    from megatron_vlbridge.checkpoint.export_plan import ExportChoices, plan_export

    if args.adapter:
        return _run_adapter_export(args)
    choices = ExportChoices(args.dtype, args.experts, args.max_shard_size, args.portable_config, args.fp8)
    return convert(args, plan_export(args.megatron_folder, args.hf_folder, args.like, choices))


def _run_adapter_export(args: argparse.Namespace) -> int:
    from megatron_vlbridge.checkpoint.peft.export import export_adapter

    others = ("dtype", "experts", "max_shard_size", "portable_config", "fp8", "resume", "dry_run", "workers", "memory")
    if given := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]:
        raise UsageError(
            f"{given[0]}: expected none with --adapter, which writes a small folder at once. Leave it out."
        )
    done = str(export_adapter(args.megatron_folder, args.hf_folder, args.like))
    show(json.dumps({"done": done}) if args.json else done)
    return 0


def _add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="a Hugging Face folder, Hub id or Megatron folder")
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder that peft or export --adapter wrote")
    parser.add_argument("hf_folder", metavar="OUT", help="the result: a new or an empty folder")
    parser.add_argument(
        "--like", metavar="HF_DIR", help="for a Megatron base: the folder or Hub id that it started from (config, ...)"
    )
    add_run_options(parser)


def _run_merge(args: argparse.Namespace) -> int:
    from megatron_vlbridge.checkpoint.peft.merge import plan_merge

    return convert(args, plan_merge(args.base, args.adapter, args.hf_folder, like=args.like, experts=args.experts))


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a Hugging Face folder, Hub id or Megatron folder")
    parser.add_argument("b", metavar="B", nargs="?", help="another of either kind (default: A's own checksums)")
    add_experts(parser)
    add_ignore(parser)
    add_json(parser)


def _run_verify(args: argparse.Namespace) -> int:
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


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a Hugging Face folder, Hub id or Megatron folder")
    parser.add_argument(
        "--pp",
        type=count,
        metavar="N",
        help="show the layers of N pipeline stages, with Megatron's arguments for it",
    )
    add_json(parser)


def _run_inspect(args: argparse.Namespace) -> int:
    from megatron_vlbridge.checkpoint.inspect import inspect, table_lines

    found = inspect(args.folder)
    show(json.dumps(found.as_json(args.pp)) if args.json else "\n".join(table_lines(found, args.pp)))
    return 0


def _add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("csv_file", metavar="FILE.csv", help="what a run wrote with --metrics-csv")
    parser.add_argument("-o", "--output", metavar="FILE", help="a .svg or .html file (default: FILE.svg)")
    add_json(parser)


def _run_plot(args: argparse.Namespace) -> int:
    from megatron_vlbridge.training.metrics.plot import plot

    done = plot(args.csv_file, args.output)
    show(json.dumps({"done": str(done)}) if args.json else str(done))
    return 0


COMMANDS = {
    "import": Command(
        "Hugging Face checkpoint -> Megatron torch_dist checkpoint",
        """Write a Hugging Face checkpoint as a Megatron torch_dist checkpoint. It loads
with Megatron's --load and --pretrained-checkpoint at any parallel layout, and
keeps config, tokenizer and processor for the export.

example:
  vlbridge import Qwen/Qwen3-VL-2B-Instruct qwen3-vl-2b-megatron""",
        _add_import_arguments,
        _run_import,
    ),
    "export": Command(
        "Megatron torch_dist checkpoint -> Hugging Face checkpoint",
        """Write the weights of a Megatron torch_dist checkpoint as a Hugging Face
checkpoint. Config, tokenizer and processor come from the import, or from the
folder that --like names.

example:
  vlbridge export run trained --like Qwen/Qwen3-VL-2B-Instruct""",
        _add_export_arguments,
        _run_export,
    ),
    "merge": Command(
        "Hugging Face checkpoint + adapter (LoRA) -> Hugging Face checkpoint",
        """Write a checkpoint with the adapter in a folder of peft merged into its weights,
as peft's merge_and_unload does, without a model. All other files are those of
the base.

example:
  vlbridge merge Qwen/Qwen3-VL-2B-Instruct adapter merged""",
        _add_merge_arguments,
        _run_merge,
    ),
    "verify": Command(
        "compare two checkpoints bit for bit, or one with its own checksums",
        """Compare two checkpoints, each a Hugging Face or a Megatron folder, bit for bit.
With one folder that import or export wrote, compare its files with their
checksums. The exit code is 0 only if all is equal.

examples:
  vlbridge verify Qwen/Qwen3-VL-2B-Instruct qwen3-vl-2b-megatron
  vlbridge verify qwen3-vl-2b-megatron""",
        _add_verify_arguments,
        _run_verify,
    ),
    "inspect": Command(
        "show what a checkpoint holds",
        """Show what a checkpoint holds: its architecture, parameters by part, dtypes and
tensors, and with --pp how its decoder layers split over pipeline stages. Only
headers are read.

example:
  vlbridge inspect Qwen/Qwen3-VL-2B-Instruct --pp 4""",
        _add_inspect_arguments,
        _run_inspect,
    ),
    "plot": Command(
        "draw the metrics of a training run",
        """Draw the CSV file that a training run wrote with --metrics-csv, as SVG or as a
page: losses, grad norm, rates, and what the packs held, by iteration.

example:
  vlbridge plot metrics.csv -o metrics.html""",
        _add_plot_arguments,
        _run_plot,
    ),
    "data": Command(data.SUMMARY, data.DESCRIPTION, data.add_arguments, data.run),
}
