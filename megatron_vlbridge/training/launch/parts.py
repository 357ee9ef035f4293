"""The arguments of what is trained: frozen parts of the model, and their learning rates."""

import argparse
from typing import Any

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.parts import PARTS, check_multiplier, check_parts, freeze, parts_of, set_lr_multipliers
from megatron_vlbridge.model.vlm import Qwen3VLModel


def add_part_arguments(group: Any) -> None:
    """`--freeze` and the learning-rate multipliers."""
    group.add_argument(
        "--freeze", nargs="+", choices=PARTS, default=[], metavar="PART", help=f"do not train: {', '.join(PARTS)}"
    )
    for part in PARTS:
        group.add_argument(_flag(part), type=float, help=f"multiply the learning rate of: {part}")


def lr_multipliers(args: argparse.Namespace) -> dict[str, float]:
    """The multipliers that the arguments give, by part."""
    given = {part: getattr(args, _flag(part)[2:].replace("-", "_"), None) for part in PARTS}
    return {part: value for part, value in given.items() if value is not None}


def check_part_arguments(args: argparse.Namespace, config: Config) -> None:
    """Reject parts that the model does not have, a run that trains nothing, and multipliers that would not be exact.

    Raises VLBridgeError, naming the argument.
    """
    check_parts(config, args.freeze)
    if args.freeze_all_layers and not args.skip_train:
        raise VLBridgeError("--freeze-all-layers leaves no parameter to train; use --freeze, or add --skip-train")
    if set(args.freeze) >= set(parts_of(config)):
        raise VLBridgeError(
            f"--freeze {' '.join(args.freeze)} leaves no parameter to train; leave out one of {', '.join(args.freeze)}"
        )
    multipliers = lr_multipliers(args)
    check_parts(config, multipliers)
    for part, value in multipliers.items():
        check_multiplier(part, value)
        if part in args.freeze:
            raise VLBridgeError(f"{_flag(part)} {value}: --freeze {part} trains it with no learning rate; use only one")
    if not multipliers:
        return
    flags = ", ".join(map(_flag, multipliers))
    if args.lr_warmup_init:
        # Megatron starts every group at this rate.
        raise VLBridgeError(f"--lr-warmup-init {args.lr_warmup_init} with {flags}: expected 0, which is multiplied too")
    if args.decoupled_lr is not None and {"language", "embedding"} & multipliers.keys():
        raise VLBridgeError(f"--decoupled-lr with {flags}: both set the learning rate of the embedding or the head")


def apply_part_arguments(args: argparse.Namespace, model: Qwen3VLModel) -> None:
    """Freeze the parts of a stage of the model, and mark those with a learning rate of their own."""
    freeze(model, args.freeze)
    set_lr_multipliers(model, lr_multipliers(args))


def check_resumed_parts(args: argparse.Namespace, saved: argparse.Namespace | None, folder: str) -> None:
    """Reject a saved optimizer whose parameters or learning-rate multipliers are not those of this run.

    Raises VLBridgeError, naming the checkpoint and both.
    """
    if saved is None:
        return
    before, now = set(getattr(saved, "freeze", [])), set(args.freeze)
    if before != now:
        raise VLBridgeError(
            f"{folder} was saved with {_words(before)}, and this run is with {_words(now)}: the saved optimizer has no "
            "state for other parameters. Give the same parts, or start a new state with --no-load-optim"
        )
    given, multipliers = lr_multipliers(saved), lr_multipliers(args)
    if given != multipliers:
        raise VLBridgeError(
            f"{folder} was saved with the learning-rate multipliers {given or 'none'}, and this run has "
            f"{multipliers or 'none'}: Megatron finds the saved groups of parameters by their rates. Give the same "
            "multipliers, or start a new state with --no-load-optim"
        )


def _flag(part: str) -> str:
    return f"--{part}-lr-mult"


def _words(parts: set[str]) -> str:
    return "--freeze " + " ".join(part for part in PARTS if part in parts) if parts else "nothing frozen"
