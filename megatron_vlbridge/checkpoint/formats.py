"""Which kind of checkpoint a folder is, and where the iteration lies that a run saved last."""

import re
from pathlib import Path

from megatron_vlbridge.errors import VLBridgeError

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = "metadata.json"

_DCP = ".metadata"
_LEGACY = "mp_rank_*"  # one folder per rank: --ckpt-format torch


def is_megatron(folder: Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint or one iteration of it, in any format, whole or damaged."""
    return (folder / _DCP).exists() or (folder / TRACKER).exists() or any(folder.glob(_LEGACY))


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint, whole or damaged."""
    return not is_megatron(folder) and ((folder / "config.json").exists() or any(folder.glob("*.safetensors")))


def reject_file(path: Path) -> None:
    """Raise VLBridgeError for the path of a file, which names the folder to give instead."""
    if path.is_file():
        raise VLBridgeError(f"{path}: expected a folder, found a file. Give the folder that holds it: {path.parent}.")


def reject_megatron(path: str | Path) -> None:
    """Raise VLBridgeError for a Megatron folder where a Hugging Face folder is needed."""
    if is_megatron(Path(path)):
        raise VLBridgeError(
            f"{path}: expected a Hugging Face checkpoint, found a Megatron checkpoint. To convert it to Hugging Face, "
            "use vlbridge export (in Python: export_checkpoint)."
        )


def reject_hugging_face(path: Path) -> None:
    """Raise VLBridgeError for a Hugging Face folder where a Megatron folder is needed."""
    if is_hugging_face(path):
        raise VLBridgeError(
            f"{path}: expected a Megatron checkpoint, found a Hugging Face checkpoint. To convert it to Megatron, use "
            "vlbridge import (in Python: import_checkpoint)."
        )


def reject_other_formats(folder: Path) -> None:
    """Raise VLBridgeError for an iteration that Megatron saved in another format than torch_dist."""
    ranks = sorted(folder.glob(_LEGACY))
    if ranks and not (folder / _DCP).is_file():
        raise VLBridgeError(
            f"{folder}: expected a torch_dist checkpoint, found {ranks[0].name}, as --ckpt-format torch saves it. "
            "Convert it: run the training command once more, at the same parallel layout, with --load RUN "
            "--ckpt-format torch --ckpt-convert-format torch_dist --ckpt-convert-save NEW, which saves NEW/torch_dist "
            "and ends; export that. Train with --ckpt-format torch_dist from then on."
        )
    if (folder / _DCP).is_file() and not (folder / FORMAT).exists():
        raise VLBridgeError(
            f"{folder}: expected a torch_dist checkpoint, found {_DCP} without {FORMAT}, as --ckpt-format torch_dcp "
            f"and fsdp_dtensor save it. Train with --ckpt-format torch_dist; if that was done, {FORMAT} is lost: copy "
            "the folder again."
        )


def locate(folder: str | Path) -> Path:
    """The folder of one saved iteration: `folder` itself, or the one that its tracker file names."""
    folder = Path(folder)
    reject_file(folder)
    reject_other_formats(folder)
    if (folder / _DCP).is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        reject_hugging_face(folder)
        raise VLBridgeError(
            f"{folder}: expected a torch_dist checkpoint ({_DCP}) or {TRACKER}, found neither. "
            "Give the folder that Megatron saved to, or one iteration in it."
        )
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not re.fullmatch("[0-9]{1,18}", text):
        raise VLBridgeError(f"{tracker}: expected an iteration or 'release', found {text!r:.60}. Name one by hand.")
    found = folder / ("release" if text == "release" else f"iter_{int(text):07}")
    reject_other_formats(found)
    if not (found / _DCP).is_file():
        raise VLBridgeError(f"{tracker}: it names {found.name}, expected {_DCP} there, found none. Copy it again.")
    return found
