"""The arguments of adapters (LoRA): what they are, where they go, and which weights they are added to."""

import argparse
from pathlib import Path
from typing import Any

from megatron_vlbridge.checkpoint.peft.manifest import AdapterManifest, read_adapter_manifest, write_adapter_manifest
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import read_config
from megatron_vlbridge.model.lora.attach import LoraSettings, add_lora, lora_settings
from megatron_vlbridge.model.vlm import Qwen3VLModel


def add_lora_arguments(group: Any) -> None:
    """`--lora-rank` and what belongs to it."""
    group.add_argument("--lora-rank", type=int, help="train adapters of this rank (LoRA) and nothing else")
    group.add_argument("--lora-alpha", type=float, help="the output of adapters is multiplied by alpha / rank")
    group.add_argument("--lora-dropout", type=float, default=0.0, help="dropout of the input of adapters")
    group.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="projections with an adapter: names as in peft, or regular expressions of full paths (default: all those "
        "of the decoder layers)",
    )
    group.add_argument("--lora-vision", action="store_true", help="adapters for the vision tower too")
    group.set_defaults(lora_base=None)  # see `keep_base`


def check_lora_arguments(args: argparse.Namespace, config: Config) -> None:
    """Reject targets, ranks and arguments that do not go together.

    Raises VLBridgeError, naming the argument.
    """
    if args.lora_rank is None:
        given = {
            "--lora-alpha": args.lora_alpha is not None,
            "--lora-dropout": bool(args.lora_dropout),
            "--lora-targets": args.lora_targets is not None,
            "--lora-vision": args.lora_vision,
        }
        if flags := [flag for flag, is_given in given.items() if is_given]:
            raise VLBridgeError(f"{flags[0]}: expected --lora-rank too, found none. Add it, such as --lora-rank 16")
        return
    if args.lora_alpha is None:
        raise VLBridgeError(
            f"--lora-rank {args.lora_rank}: expected --lora-alpha too, found none. Add it, such as --lora-alpha "
            f"{2 * args.lora_rank}"
        )
    contradicting = {
        "--freeze": (args.freeze, "all parts are frozen; choose what is trained with --lora-targets"),
        "--random-weights": (args.random_weights, "checkpoints hold the adapters alone; start from saved weights"),
        "--random-mtp": (args.random_mtp, "checkpoints hold the adapters alone; train the MTP layer first"),
    }
    for flag, (is_given, reason) in contradicting.items():
        if is_given:
            raise VLBridgeError(f"{flag}: expected none with --lora-rank: {reason}")
    settings_of(args, config)


def settings_of(args: argparse.Namespace, config: Config) -> LoraSettings:
    """The adapters that the arguments describe."""
    return lora_settings(config, **_keywords(args))


def apply_lora_arguments(args: argparse.Namespace, model: Qwen3VLModel) -> None:
    """Add the adapters to a stage of the model."""
    if args.lora_rank is not None:
        add_lora(model, **_keywords(args), seed=args.seed)


def keep_base(args: argparse.Namespace) -> None:
    """Make `--pretrained-checkpoint` the weights that adapters are added to; Megatron would look for these in it."""
    if args.lora_rank is not None:
        args.lora_base, args.pretrained_checkpoint = args.pretrained_checkpoint, None


def check_resumed_lora(args: argparse.Namespace, folder: Path) -> None:
    """Reject a checkpoint in `--load` that does not hold the adapters of this run.

    Raises VLBridgeError, naming the checkpoint and what differs.
    """
    saved = read_adapter_manifest(folder)
    if args.lora_rank is None:
        if saved is not None:
            raise VLBridgeError(
                f"--load {folder}: expected the weights of a model, found adapters of rank {saved.rank}. Continue "
                f"with --lora-rank {saved.rank} --lora-alpha {saved.alpha:g} and the other arguments of that run"
            )
        return
    if saved is None:
        raise VLBridgeError(
            f"--load {folder}: expected adapters (--lora-rank), found none. Give the weights that they are added to "
            "as --pretrained-checkpoint, and as --load a folder where this run saves"
        )
    now = _manifest(args)
    for name in ("rank", "alpha"):
        before, given = getattr(saved, name), getattr(now, name)
        if before != given:
            raise VLBridgeError(
                f"--load {folder} was saved with --lora-{name} {before}, and this run has {given}. Give the same"
            )
    if differing := set(saved.weights) ^ set(now.weights):
        one = min(differing)
        raise VLBridgeError(
            f"--load {folder} has adapters of {len(saved.weights)} weights, and this run of {len(now.weights)}; {one} "
            f"has one only {'there' if one in saved.weights else 'here'}. Give the --lora-targets of that run"
        )


def lora_note(args: argparse.Namespace) -> Any:
    """Notes the adapters in the folder of an iteration; called on all ranks."""

    def write(folder: Path) -> None:
        if args.lora_rank is not None and args.rank == 0:
            write_adapter_manifest(folder, _manifest(args))

    return write


def _manifest(args: argparse.Namespace) -> AdapterManifest:
    settings = settings_of(args, read_config(args.hf_folder))
    return AdapterManifest(settings.rank, settings.alpha, settings.weights, str(args.hf_folder))


def _keywords(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "rank": args.lora_rank,
        "alpha": args.lora_alpha,
        "dropout": args.lora_dropout,
        "targets": args.lora_targets,
        "vision": args.lora_vision,
    }
