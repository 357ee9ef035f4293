"""Where a run starts from: which weights, and whether its checkpoint continues with these arguments."""

import argparse
import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import checkpoint_exists, get_checkpoint_name, get_checkpoint_tracker_filename
from megatron.training.training import get_optimizer_param_scheduler

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.hf.source import open_source
from megatron_vlbridge.checkpoint.torch_dist.reader import TorchDistFolder
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import read_config
from megatron_vlbridge.training.launch.lora import check_resumed_lora
from megatron_vlbridge.training.launch.parts import check_resumed_parts
from megatron_vlbridge.weights import Plan
from megatron_vlbridge.weights.plan import any_dtype

_SOURCES = ("--hf-weights", "--pretrained-checkpoint", "--random-weights")
_STEP = "--ckpt-step"

# Entry of the saved scheduler -> what it comes from. Steps are counted in samples.
_SCHEDULE = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters x --global-batch-size",
    "lr_decay_steps": "--lr-decay-iters (default: --train-iters) x --global-batch-size",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--start-weight-decay (default: --weight-decay)",
    "end_wd": "--end-weight-decay (default: --weight-decay)",
    "wd_incr_steps": "--train-iters x --global-batch-size",
    "wd_incr_style": "--weight-decay-incr-style",
}


@contextmanager
def megatron_errors() -> Iterator[None]:
    """What Megatron raises because of an argument, as VLBridgeError; an assertion without a message gives its line."""
    try:
        yield
    except VLBridgeError:
        raise
    except SystemExit as error:
        raise VLBridgeError("Megatron rejects these arguments; it printed its reason before") from error
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split()) or f"{place.line} ({Path(place.filename).name}, line {place.lineno})"
        raise VLBridgeError(f"Megatron rejects these arguments: {text}") from error


@contextmanager
def loading_errors() -> Iterator[None]:
    """Where Megatron-Core 0.19 cannot load a checkpoint it may print why and exit with 0: here a VLBridgeError."""
    try:
        yield
    except SystemExit as error:
        if all(frame.name != "load_checkpoint" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        cause = f": {error.__context__!r}" if error.__context__ else ""
        raise VLBridgeError(f"Megatron could not load the checkpoint; it printed its reason before{cause}") from error


def loads_checkpoint(args: argparse.Namespace) -> bool:
    """Whether the run continues from `--load`; otherwise it starts from the source that another argument names."""
    return bool(args.load) and checkpoint_exists(args.load)


def check_source(args: argparse.Namespace) -> None:
    """Reject a run that does not state which weights it starts from, or names a checkpoint that does not exist.

    `--load` wins where it holds a checkpoint. A folder without one is where a run that is to be resumed will save, so
    the first start needs one of the other sources. A run of adapters always does: `--load` holds adapters alone.

    Raises VLBridgeError: no source or several; a folder without a checkpoint; a checkpoint without its files.
    """
    given = [flag for flag in _SOURCES if getattr(args, flag[2:].replace("-", "_"))]
    if len(given) > 1:
        raise VLBridgeError(f"{' and '.join(given)}: weights come from one source; leave the others out")
    if args.random_mtp and not args.hf_weights:
        raise VLBridgeError("--random-mtp: expected --hf-weights, the only source of weights without an MTP layer")
    loads = loads_checkpoint(args)
    if loads:
        check_resumed_lora(args, _checkpoint(args.load, args.ckpt_step))
        if args.lora_rank is None:
            return
    if args.pretrained_checkpoint:
        if not checkpoint_exists(args.pretrained_checkpoint):
            raise VLBridgeError(_no_checkpoint("--pretrained-checkpoint", args.pretrained_checkpoint))
        step = None if loads else args.ckpt_step
        _check_tensors(_checkpoint(args.pretrained_checkpoint, step), args.hf_folder)
        return
    asked = [flag for flag in ("--exit-on-missing-checkpoint", _STEP) if getattr(args, flag[2:].replace("-", "_"))]
    if args.load and asked and not loads:
        raise VLBridgeError(f"{_no_checkpoint('--load', args.load)}, which {asked[0]} asks for")
    if not given and loads:
        raise VLBridgeError(
            f"--load {args.load}: it holds adapters alone, and the arguments do not say which weights they are added "
            "to: add --hf-weights (those in --hf-folder) or --pretrained-checkpoint DIR (an imported checkpoint)"
        )
    if not given:
        saved = f"{_no_checkpoint('--load', args.load)}, and " if args.load else ""
        raise VLBridgeError(
            f"{saved}the arguments do not say which weights to start from: add --hf-weights (those in --hf-folder), "
            "--pretrained-checkpoint DIR (an imported checkpoint), --load DIR (to resume) or --random-weights"
        )
    if args.hf_weights:
        source = open_source(Path(args.hf_folder), random_mtp=args.random_mtp)
        model = any_dtype(source.table.megatron_shapes)
        Plan(source.table, source.tensors, model, cast=True, hf_source=args.hf_folder, megatron_source="the model")


def started_from(args: argparse.Namespace) -> Path | None:
    """The folder of the Megatron checkpoint that the run starts from, once :func:`check_source` has passed."""
    if loads_checkpoint(args):
        return _checkpoint(args.load, args.ckpt_step)
    pretrained = args.pretrained_checkpoint or args.lora_base
    return _checkpoint(pretrained, args.ckpt_step) if pretrained else None


def _check_tensors(checkpoint: Path, hf_folder: str) -> None:
    """Reject a checkpoint whose tensors are not those of the model of `--hf-folder`; only headers are read."""
    if dist_checkpointing.check_is_distributed_checkpoint(str(checkpoint)):
        config = read_config(hf_folder)
        table = families.find(config).table_for(config)
        hf, found = any_dtype(table.hf_shapes), TorchDistFolder(checkpoint).table
        Plan(table, hf, found, cast=True, hf_source=f"the model of {hf_folder}", megatron_source=str(checkpoint))


def _no_checkpoint(flag: str, folder: str) -> str:
    found = "a folder without latest_checkpointed_iteration.txt" if Path(folder).is_dir() else "no such folder"
    return f"{flag} {folder}: expected a Megatron checkpoint, found {found}"


def _checkpoint(folder: str, step: int | None) -> Path:
    """The folder of the checkpoint that Megatron would load."""
    tracker = Path(get_checkpoint_tracker_filename(folder))
    text = tracker.read_text(encoding="utf-8").strip()
    release = text == "release"
    if not release and not text.isdecimal():
        raise VLBridgeError(f"{tracker}: expected an iteration or 'release', found {text[:40]!r}")
    found = Path(get_checkpoint_name(folder, step or int("0" if release else text), release, return_base_dir=True))
    if not found.is_dir():
        named = f"{_STEP} {step}" if step and not release else f"{tracker.name}, which says {text!r}"
        others = sorted(path.name for path in Path(folder).glob("iter_*"))
        raise VLBridgeError(f"{found}: no such folder; it is named by {named}. {folder} has {others or 'no iteration'}")
    if not dist_checkpointing.check_is_distributed_checkpoint(str(found)) and not any(found.glob("mp_rank_*")):
        raise VLBridgeError(f"{found}: expected a Megatron checkpoint, found neither metadata.json nor mp_rank_*")
    return found


def check_resumed(args: argparse.Namespace) -> None:
    """Reject a checkpoint in `--load` whose optimizer or schedule does not continue with these arguments.

    Megatron's global arguments are set; they are not changed.

    Raises VLBridgeError, naming every value of the schedule that differs, and what to do.
    """
    if not loads_checkpoint(args) or args.finetune or args.no_load_optim or args.skip_train:
        return
    folder = _checkpoint(args.load, args.ckpt_step)
    if folder.name == "release":
        # Only the checkpoint of a run has an optimizer's state, an imported folder does not.
        return
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        return
    saved = dist_checkpointing.load_common_state_dict(str(folder))
    check_backend(args, saved.get("args"), str(folder))
    check_resumed_parts(args, saved.get("args"), str(folder))
    scheduler = saved.get("opt_param_scheduler")
    if scheduler and not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        check_schedule(scheduler, schedule(args), str(folder))


def check_backend(args: argparse.Namespace, saved: argparse.Namespace | None, folder: str) -> None:
    """Reject the state of `--use-distributed-optimizer` where the CPU saved it or would load it.

    Megatron-Core saves it as flat buffers in the order of the parameters, which differs between the backends, so the
    state of each parameter would silently become that of another; and a resumed run on the CPU has another curve.

    Raises VLBridgeError, naming the checkpoint and both backends.
    """
    written, read = (("GPUs", "the CPU")[bool(getattr(found, "cpu", False))] for found in (saved, args))
    if args.use_distributed_optimizer and "the CPU" in (written, read):
        raise VLBridgeError(
            f"{folder} was saved on {written}, and this run is on {read}: the state of --use-distributed-optimizer is "
            "continued only by GPUs from GPUs. Leave --use-distributed-optimizer out of both runs, or start a new "
            "state with --no-load-optim"
        )


def schedule(args: argparse.Namespace) -> dict[str, Any]:
    """What Megatron's scheduler would save with these arguments, which are Megatron's global ones."""
    given = dict(vars(args))
    try:
        with megatron_errors():
            state: dict[str, Any] = get_optimizer_param_scheduler(SimpleNamespace(param_groups=[])).state_dict()
    finally:
        # It writes defaults into the arguments, and may not find them there when it is called again.
        vars(args).clear()
        vars(args).update(given)
    return state


def check_schedule(saved: dict[str, Any], given: dict[str, Any], folder: str) -> None:
    """Reject a schedule that Megatron would not continue: every value must be the saved one.

    Raises VLBridgeError, naming each that differs.
    """
    lines = [
        f"  {flag}: saved {saved[name]}, given {given[name]}"
        for name, flag in _SCHEDULE.items()
        if name in saved and saved[name] != given[name]
    ]
    if lines:
        raise VLBridgeError(
            "\n".join([f"{folder} was trained with another schedule of learning rate and weight decay:", *lines])
            + "\nTo continue with the given values add --override-opt_param-scheduler, with the saved ones "
            "--use-checkpoint-opt_param-scheduler; --finetune starts a new schedule from these weights"
        )


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
