"""The `vlbridge` command: arguments, progress and exit codes, no logic.

Exit codes: 0 done, 1 a difference or an unfit input was found, 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_vlbridge.checkpoint.checksums import verify_checksums
from megatron_vlbridge.checkpoint.conversion import Conversion
from megatron_vlbridge.checkpoint.convert import plan_export, plan_import
from megatron_vlbridge.checkpoint.engine import DEFAULT_MEMORY, Options, Progress
from megatron_vlbridge.checkpoint.inspect import inspect, table_lines
from megatron_vlbridge.checkpoint.verify import first_lines, verify
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import ExpertForm
from megatron_vlbridge.weights.plan import MisfitError

_FORMS = ", ".join(form.value for form in ExpertForm)
_ESTIMATES = (100, 500, 2000)  # MB/s: network, disk, NVMe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except VLBridgeError as error:
        if args.json:
            print(json.dumps({"error": str(error), "misfits": error.misfits if isinstance(error, MisfitError) else {}}))
        else:
            print(f"vlbridge {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "; what is finished is kept for --resume" if hasattr(args, "resume") else ""
        print(f"vlbridge {args.command}: interrupted{kept}", file=sys.stderr)
        return 130


def _import(args: argparse.Namespace) -> int:
    names = ("dtype", "experts", "leave_out")
    plan = plan_import(args.hf_folder, args.megatron_folder, **{name: getattr(args, name) for name in names})
    return _convert(args, plan)


def _export(args: argparse.Namespace) -> int:
    names = ("like", "dtype", "experts", "max_shard_size")
    plan = plan_export(args.megatron_folder, args.hf_folder, **{name: getattr(args, name) for name in names})
    return _convert(args, plan)


def _convert(args: argparse.Namespace, plan: Conversion) -> int:
    options = Options(args.workers, args.memory, _Meter(as_json=args.json))
    summary = plan.summary(options)
    if args.dry_run:
        estimate = {rate: summary["bytes"] / rate / 1e6 for rate in _ESTIMATES}
        if not args.json:  # people see the plan also of what is refused
            print("\n".join(_summary_lines(summary, estimate)))
        plan.check_run(options, resume=args.resume)
        if args.json:
            print(json.dumps({**summary, "seconds_at_mb_per_s": estimate}))
        return 0
    done = plan.run(options, resume=args.resume)
    print(json.dumps({"done": str(done), **summary}) if args.json else done)
    return 0


def _summary_lines(summary: dict[str, Any], estimate: dict[int, float]) -> list[str]:
    times = ", ".join(f"{_time(seconds)} at {rate} MB/s" for rate, seconds in estimate.items())
    return [
        f"{summary['kind']} of a {summary['architecture']}: {summary['source']} -> {summary['target']}",
        f"{summary['hf_tensors']} Hugging Face tensors <-> {summary['megatron_tensors']} Megatron tensors, "
        "every number covered once",
        f"{summary['bytes'] / 1e9:.3f} GB to write in {summary['parts']} parts, "
        f"{summary['free_bytes'] / 1e9:.3f} GB free",
        f"{summary['workers']} workers, at most {summary['memory_bytes'] / 2**20:.0f} MiB of memory",
        f"about {times}",
        *summary["notes"],
    ]


def _verify(args: argparse.Namespace) -> int:
    if args.b is None:
        report = verify_checksums(args.a)
    else:
        report = verify(args.a, args.b, leave_out=args.leave_out, experts=args.experts)
    if args.json:
        print(json.dumps({"equal": report.equal, **asdict(report)}))
    else:
        print("\n".join(first_lines(report)))
    return 0 if report.equal else 1


def _inspect(args: argparse.Namespace) -> int:
    found = inspect(args.folder)
    print(json.dumps(found.as_json(args.pp)) if args.json else "\n".join(table_lines(found, args.pp)))
    return 0


class _Meter:
    """Progress on stderr: one line that is rewritten on a terminal, a line per tenth elsewhere, JSON if asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self._json, self._terminal, self._tenth = as_json, sys.stderr.isatty(), 0

    def __call__(self, progress: Progress) -> None:
        if self._json:
            print(json.dumps(asdict(progress)), file=sys.stderr)
            return
        share = progress.done / progress.total if progress.total else 1.0
        left = f"{_time(progress.seconds_left)} left" if progress.done < progress.total else "done"
        line = f"{progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB, {progress.rate / 1e6:.0f} MB/s, {left}"
        if self._terminal:
            end = "\n" if progress.done == progress.total else ""
            print(f"\r{share:4.0%} {line}\x1b[K", end=end, file=sys.stderr, flush=True)
        elif int(10 * share) > self._tenth:
            self._tenth = int(10 * share)
            print(f"{share:4.0%} {line}", file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _size(text: str) -> int:
    """`512MiB`, `5GB`, `1000` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?)B)?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size such as 1GiB or 512MiB, found {text!r}")
    power = " kMGT".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlbridge", description="Qwen-VL checkpoints: Hugging Face <-> Megatron-Core")
    commands = parser.add_subparsers(dest="command", required=True)
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument(
        "--json", action="store_true", help="results and errors as JSON on stdout, progress as JSON on stderr"
    )
    convert = argparse.ArgumentParser(add_help=False, parents=[machine])
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="convert all weights (default: keep)"
    )
    convert.add_argument("--experts", help=f"their form on the Hugging Face side (default: as it is found): {_FORMS}")
    convert.add_argument("--workers", type=int, help="threads that read and write (default: the cores)")
    convert.add_argument("--memory", type=_size, default=DEFAULT_MEMORY, help="at most this (default: 1GiB)")
    convert.add_argument("--resume", action="store_true", help="continue an interrupted run")
    convert.add_argument("--dry-run", action="store_true", help="print the plan, check what a run would, write nothing")
    leave = argparse.ArgumentParser(add_help=False)
    leave.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out Hugging Face tensors of such names, such as 'rotary.*', which are no part of the model",
    )
    read = commands.add_parser(
        "import", parents=[convert, leave], help="Hugging Face folder -> Megatron torch_dist folder"
    )
    read.add_argument("hf_folder", help="a folder, or a Hub id such as Qwen/Qwen3-VL-2B-Instruct")
    read.add_argument("megatron_folder", help="must not exist")
    read.set_defaults(run=_import)
    write = commands.add_parser("export", parents=[convert], help="Megatron torch_dist folder -> Hugging Face folder")
    write.add_argument("megatron_folder", help="an imported folder, or what a training run saved")
    write.add_argument("hf_folder", help="must not exist")
    write.add_argument("--like", help="the Hugging Face folder or Hub id that training started from (config, ...)")
    write.add_argument("--max-shard-size", type=_size, help="such as 5GB (default: the source's shards)")
    write.set_defaults(run=_export)
    check = commands.add_parser("verify", parents=[machine, leave], help="are two checkpoints the same, is one intact")
    check.add_argument("a", help="a Hugging Face folder, Hub id or Megatron folder")
    check.add_argument("b", nargs="?", help="another, of either kind; without it A's own checksums are checked")
    check.add_argument("--experts", help=f"their form on the Hugging Face side (default: as it is found): {_FORMS}")
    check.set_defaults(run=_verify)
    look = commands.add_parser("inspect", parents=[machine], help="what a checkpoint holds")
    look.add_argument("folder", help="a Hugging Face folder, Hub id or Megatron folder")
    look.add_argument("--pp", type=int, help="show the layers of each of so many pipeline stages")
    look.set_defaults(run=_inspect)
    return parser


if __name__ == "__main__":
    sys.exit(main())
