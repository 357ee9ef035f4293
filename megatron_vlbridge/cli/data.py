"""The command `vlbridge data`: look at the conversations of a data file, measure and pack them."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlbridge.cli.arguments import add_json, count, seed
from megatron_vlbridge.cli.output import show
from megatron_vlbridge.errors import UsageError, VLBridgeError

if TYPE_CHECKING:
    from megatron_vlbridge.data.report.commands import Data, Progress

MAX_SHOWN = 100  # failures
SHOWN = 8  # conversations on a page
ACTIONS = ("check", "index", "pack")
# The options of one action alone, with their defaults.
OWN: dict[str, dict[str, Any]] = {
    "check": {"html": None, "show": None},
    "index": {"workers": 1},
    "pack": {"seq_length": None, "pack_multiple_of": 1, "data_parallel_size": 1, "seed": 1234, "max_bad_samples": 0.0},
}
SUMMARY = "check, measure and pack the conversations of a data file"
DESCRIPTION = """Look at the conversations of a data file, the one of --data of a training.

  check  encode every conversation, media included; count tokens, images and
         videos, list every failure with file and line, and with --html write a
         page that shows conversations with the tokens that are learned
  index  measure every conversation from the headers of its media and write the
         lengths beside the data file, from where a training reads them
  pack   form the packs of the first epoch: how full they are, and the vision
         work of each data-parallel rank

examples:
  vlbridge data check meta.yaml --hf-folder Qwen3-VL-2B --html a.html
  vlbridge data index meta.yaml --hf-folder Qwen3-VL-2B --workers 8
  vlbridge data pack meta.yaml --hf-folder Qwen3-VL-2B --seq-length 8192"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of all actions, and those of training that say how conversations are encoded."""
    from megatron_vlbridge.training.launch.labels import add_label_arguments
    from megatron_vlbridge.training.launch.media import add_media_arguments
    from megatron_vlbridge.training.launch.packing import add_packing_arguments

    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("data", metavar="DATA", help="a YAML file of sources, or one file of conversations")
    parser.add_argument("--hf-folder", required=True, metavar="HF_DIR", help="the Hugging Face folder of the model")
    parser.add_argument("--html", metavar="FILE", help="check: write a page")
    parser.add_argument("--show", type=count, metavar="N", help="check: conversations of each split on the page (8)")
    parser.add_argument("--workers", type=count, metavar="N", help="index: processes (1)")
    parser.add_argument("--seq-length", type=count, metavar="N", help="pack: tokens of a pack")
    parser.add_argument("--pack-multiple-of", type=count, metavar="N", help="pack: as in training (1)")
    parser.add_argument("--data-parallel-size", type=count, metavar="N", help="pack: ranks that read packs (1)")
    parser.add_argument("--seed", type=seed, metavar="N", help="pack: as in training (1234)")
    parser.add_argument("--max-bad-samples", type=float, metavar="SHARE", help="pack: as in training (0)")
    add_media_arguments(parser)
    add_label_arguments(parser)
    parser.add_argument("--literal-tags", action="store_true", help="take <image> and the like in texts as text")
    add_packing_arguments(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run one action; the exit code is 1 if a conversation cannot be encoded."""
    for action, options in OWN.items():
        given = [name for name in options if getattr(args, name) is not None]
        if action != args.action and given:
            raise UsageError(f"--{given[0].replace('_', '-')} is an option of {action}, found with {args.action}")
    if args.action != "pack" and (unused := _packing_options(args)):
        raise UsageError(f"{unused[0]} is an option of pack, found with {args.action}")
    for name, default in OWN[args.action].items():
        if getattr(args, name) is None:
            setattr(args, name, default)

    from megatron_vlbridge.data.report.commands import Data
    from megatron_vlbridge.training.launch.labels import label_options
    from megatron_vlbridge.training.launch.media import media_options

    data = Data.open(
        args.data,
        args.hf_folder,
        media=media_options(args),
        labels=label_options(args),
        literal_tags=args.literal_tags,
    )
    return {"check": _check, "index": _index, "pack": _pack}[args.action](args, data)


def _packing_options(args: argparse.Namespace) -> list[str]:
    """The options of packing that have other values than by default."""
    from megatron_vlbridge.training.launch.packing import add_packing_arguments

    parser = argparse.ArgumentParser()
    add_packing_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(args, name) != value]


def _progress(args: argparse.Namespace) -> "Progress":
    def progress(split: str, done: int, total: int) -> None:
        if args.json:
            show(json.dumps({"split": split, "done": done, "total": total}), stream=sys.stderr)
        else:
            show(f"{split}: {done:,} of {total:,} conversations", stream=sys.stderr)

    return progress


def _check(args: argparse.Namespace, data: "Data") -> int:
    from megatron_vlbridge.data.report.commands import check
    from megatron_vlbridge.data.report.page import page
    from megatron_vlbridge.data.report.summary import totals

    if args.html:
        _check_target(Path(args.html))
    elif args.show is not None:
        raise UsageError("--show is an option of --html, found without it")
    summaries = list(check(data, show=(args.show or SHOWN) if args.html else 0, progress=_progress(args)))
    if args.html:
        try:
            Path(args.html).write_text(page(summaries), encoding="utf-8")
        except OSError as error:
            raise VLBridgeError(f"{args.html}: cannot write: {error.strerror}") from error
    failures = [text for summary in summaries for text in summary.failures]
    if args.json:
        splits = {
            summary.name: {
                **totals(summary),
                "tokens of roles": dict(summary.tokens),
                "supervised of roles": dict(summary.supervised),
                "excluded": summary.excluded,
            }
            for summary in summaries
        }
        show(json.dumps({"splits": splits, "failures": failures}))
        return 1 if failures else 0
    for summary in summaries:
        show(f"{summary.name}: " + ", ".join(f"{value:,} {what}" for what, value in totals(summary).items()))
        for role, tokens in summary.tokens.items():
            show(f"  {role}: {tokens:,} tokens, {summary.supervised[role]:,} supervised")
        for report in summary.turns.reports:
            show(f"  {report}")
    if args.html:
        show(f"page: {args.html}")
    for text in failures[:MAX_SHOWN]:
        show(text)
    if len(failures) > MAX_SHOWN:
        show(f"... and {len(failures) - MAX_SHOWN:,} more: --html and --json have all of them")
    return 1 if failures else 0


def _check_target(file: Path) -> None:
    """Check before the work that a page can be written."""
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        found = "a folder" if file.is_dir() else "no permission" if folder.is_dir() else "no such folder"
        raise VLBridgeError(f"{file}: cannot write: expected a file in a folder that can be written, found {found}")


def _index(args: argparse.Namespace, data: "Data") -> int:
    from megatron_vlbridge.data.report.commands import index

    results = list(index(data, workers=args.workers, progress=_progress(args)))
    if args.json:
        show(json.dumps([asdict(one) | {"path": str(one.path)} for one in results]))
    else:
        for one in results:
            show(f"{one.path}: {one.conversations:,} conversations, {one.tokens:,} tokens, {one.failed:,} failed")
            for report in one.turns.reports:
                show(f"  {report}")
            if one.failed:
                show(f"  first: {one.first_failed}")
    return 1 if any(one.failed for one in results) else 0


def _pack(args: argparse.Namespace, data: "Data") -> int:
    from megatron_vlbridge.data.report.commands import pack
    from megatron_vlbridge.training.launch.packing import packing_options

    if args.seq_length is None:
        raise UsageError("pack needs --seq-length, the tokens of a pack")
    packed = list(
        pack(
            data,
            seq_length=args.seq_length,
            multiple_of=args.pack_multiple_of,
            packing=packing_options(args),
            seed=args.seed,
            data_parallel=args.data_parallel_size,
            max_bad_samples=args.max_bad_samples,
        )
    )
    if args.json:
        show(json.dumps({split: report.as_json() | chosen.as_json() for split, report, chosen in packed}))
        return 0
    for split, report, chosen in packed:
        show(f"{split}: {report.packs:,} packs of {report.conversations:,} conversations")
        shares = f"fill {report.fill:.1%}, padding {report.padding:.1%}, empty {report.empty:.1%}"
        show(f"  {report.tokens:,} tokens: {shares}")
        patches = ", ".join(f"{value:,}" for value in report.patches)
        show(f"  patches by data-parallel rank: {patches}; vision work, busiest to mean: {report.work_imbalance:.2f}")
        for text in chosen.reports:
            show(f"  {text}")
    return 0
