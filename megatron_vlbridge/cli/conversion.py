"""What import, export and merge have in common: their options, the plan, the run."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from megatron_vlbridge.cli.arguments import DTYPES, add_experts, add_json, count, dtype, size
from megatron_vlbridge.cli.output import show
from megatron_vlbridge.cli.progress import Meter, duration

if TYPE_CHECKING:
    from megatron_vlbridge.checkpoint.conversion import Conversion

_ESTIMATES = (100, 500, 2000)  # MB/s: network, disk, NVMe


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an import or export."""
    names = ", ".join(f"{long} ({short})" for short, long in DTYPES.items())
    parser.add_argument("--dtype", type=dtype, metavar="DTYPE", help=f"convert all weights (default: keep): {names}")
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all conversions, `--experts` among them."""
    add_experts(parser)
    parser.add_argument("--workers", type=count, metavar="N", help="threads that read and write (default: the cores)")
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="at most this much memory, such as 4G (default: 1GiB)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run; a result that is complete is left as it is"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, check what a run would, write nothing")
    add_json(parser)


def convert(args: argparse.Namespace, plan: "Conversion") -> int:
    """Run a plan, or show it; gives the exit code."""
    from megatron_vlbridge.checkpoint.stream.engine import DEFAULT_MEMORY, Options

    options = Options(args.workers, args.memory or DEFAULT_MEMORY, Meter(as_json=args.json))
    summary = plan.summary(options)
    if args.dry_run:
        estimate = {rate: summary["bytes"] / rate / 1e6 for rate in _ESTIMATES}
        if not args.json:  # people see the plan also of what is refused
            show("\n".join(_summary_lines(summary, estimate)))
        plan.check_run(options, resume=args.resume)
        if args.json:
            show(json.dumps({**summary, "seconds_at_mb_per_s": estimate}))
        return 0
    if not args.json:
        for note in summary["notes"]:
            show(f"note: {note}", stream=sys.stderr)
        if args.resume and plan.is_complete():
            show(f"{plan.target} is complete: nothing to do", stream=sys.stderr)
    done = plan.run(options, resume=args.resume)
    show(json.dumps({"done": str(done), **summary}) if args.json else str(done))
    return 0


def _summary_lines(summary: dict[str, Any], estimate: dict[int, float]) -> list[str]:
    times = ", ".join(f"{duration(seconds)} at {rate} MB/s" for rate, seconds in estimate.items())
    return [
        f"{summary['kind']} of a {summary['architecture']}: {summary['source']} -> {summary['target']}",
        f"{summary['hf_tensors']} Hugging Face tensors <-> {summary['megatron_tensors']} Megatron tensors, "
        "every value covered once",
        f"{summary['bytes'] / 1e9:.3f} GB to write in {summary['parts']} parts, "
        f"{summary['free_bytes'] / 1e9:.3f} GB free",
        f"{summary['workers']} workers, at most {summary['memory_bytes'] / 2**20:.0f} MiB of memory",
        f"about {times}",
        *summary["notes"],
    ]
