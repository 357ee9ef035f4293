"""What a training run notes beside the weights that it saves: which of its settings no test verifies."""

import json
from collections.abc import Collection
from pathlib import Path

from megatron_vlbridge.checkpoint.stream.json_file import is_plain, load_json_object
from megatron_vlbridge.errors import VLBridgeError

RUN_MANIFEST = "vlbridge_run.json"
"""The file, in the folder of an iteration."""

_UNVERIFIED = "unverified"
_LONGEST = 1000


def write_run_manifest(folder: Path, unverified: Collection[str]) -> None:
    """Note these settings in the folder of an iteration."""
    content = json.dumps({_UNVERIFIED: sorted(unverified)})
    (folder / RUN_MANIFEST).write_text(content + "\n", encoding="utf-8")


def read_unverified(folder: Path) -> tuple[str, ...]:
    """The settings that are noted in the folder of an iteration; none where it has no such file.

    Raises VLBridgeError where the file is damaged.
    """
    path = folder / RUN_MANIFEST
    if not path.exists():
        return ()
    names = load_json_object(path).get(_UNVERIFIED)
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_short(name) for name in names):
        raise VLBridgeError(f"{path}: {_UNVERIFIED}: expected a list of names, found another value. Copy it again.")
    return tuple(names)


def _is_short(name: str) -> bool:
    return len(name) <= _LONGEST and is_plain(name)
