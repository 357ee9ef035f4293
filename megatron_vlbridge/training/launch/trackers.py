"""Checks of the TensorBoard and Weights & Biases arguments."""

import argparse
import importlib.util

from megatron_vlbridge.errors import VLBridgeError


def check_trackers(args: argparse.Namespace) -> None:
    """Reject `--tensorboard-dir` and `--wandb-project` where Megatron would log nothing, or fail late.

    Raises VLBridgeError: a package is not installed, or another required argument is missing.
    """
    if args.tensorboard_dir:
        _require("--tensorboard-dir", "tensorboard")
    if not args.wandb_project:
        return
    _require("--wandb-project", "wandb")
    missing = {
        "--tensorboard-dir DIR (Megatron-Core 0.19 logs to W&B only what it logs to TensorBoard)": (
            not args.tensorboard_dir
        ),
        "--wandb-exp-name NAME": not args.wandb_exp_name,
        "--wandb-save-dir DIR or --save DIR": not (args.wandb_save_dir or args.save),
    }
    needed = [argument for argument, is_missing in missing.items() if is_missing]
    if needed:
        raise VLBridgeError(f"--wandb-project {args.wandb_project}  also needs:\n  " + "\n  ".join(needed))


def _require(argument: str, package: str) -> None:
    spec = importlib.util.find_spec(package)
    # W&B creates a folder `wandb`, which Python would import as a namespace package.
    if spec is None or spec.origin is None:
        raise VLBridgeError(
            f"{argument}: the package {package} is not installed; pip install 'megatron-vlbridge[{package}]'"
        )
