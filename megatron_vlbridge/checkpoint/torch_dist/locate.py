"""Where the iteration that a run saved last lies."""

import re
from pathlib import Path

from megatron_vlbridge.checkpoint.formats import TRACKER, reject_file, reject_hugging_face, reject_other_formats
from megatron_vlbridge.errors import VLBridgeError


def locate(folder: str | Path) -> Path:
    """The folder of one saved iteration: `folder` itself, or the one that its tracker file names."""
    folder = Path(folder)
    reject_file(folder)
    reject_other_formats(folder)
    if (folder / ".metadata").is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        reject_hugging_face(folder)
        raise VLBridgeError(
            f"{folder}: expected a torch_dist checkpoint (.metadata) or {TRACKER}, found neither. "
            "Give the folder that Megatron saved to, or one iteration in it."
        )
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not re.fullmatch("[0-9]{1,18}", text):
        raise VLBridgeError(f"{tracker}: expected an iteration or 'release', found {text!r:.60}. Name one by hand.")
    found = folder / ("release" if text == "release" else f"iter_{int(text):07}")
    reject_other_formats(found)
    if not (found / ".metadata").is_file():
        raise VLBridgeError(f"{tracker}: it names {found.name}, expected .metadata there, found none. Copy it again.")
    return found
