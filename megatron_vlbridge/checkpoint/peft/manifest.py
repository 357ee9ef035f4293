"""What a training run notes beside the adapters that it saves."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_vlbridge.checkpoint.stream.json_file import is_plain, load_json_object
from megatron_vlbridge.errors import VLBridgeError

ADAPTER_MANIFEST = "vlbridge_adapter.json"
"""The file, in the folder of an iteration."""


@dataclass(frozen=True)
class AdapterManifest:
    """The adapters of a run: for `weights` of the checkpoint `base`, of one rank and alpha."""

    rank: int
    alpha: float
    weights: tuple[str, ...]
    base: str


def write_adapter_manifest(folder: Path, manifest: AdapterManifest) -> None:
    """Note the adapters in the folder of an iteration."""
    (folder / ADAPTER_MANIFEST).write_text(json.dumps(asdict(manifest)) + "\n", encoding="utf-8")


def read_adapter_manifest(folder: Path) -> AdapterManifest | None:
    """The adapters that are noted in the folder of an iteration; None where it has no such file.

    Raises VLBridgeError where the file is damaged.
    """
    path = folder / ADAPTER_MANIFEST
    if not path.exists():
        return None
    values = load_json_object(path)
    rank, alpha, weights, base = (values.get(name) for name in ("rank", "alpha", "weights", "base"))
    if type(rank) is not int or rank < 1:
        raise _error(path, "rank", "a positive integer", rank)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise _error(path, "alpha", "a positive number", alpha)
    if not isinstance(weights, list) or not all(isinstance(name, str) and is_plain(name) for name in weights):
        raise _error(path, "weights", "a list of names", weights)
    if not isinstance(base, str) or not is_plain(base):
        raise _error(path, "base", "a name", base)
    return AdapterManifest(rank, float(alpha), tuple(weights), base)


def _error(path: Path, key: str, expected: str, found: object) -> VLBridgeError:
    return VLBridgeError(f"{path}: {key}: expected {expected}, found {found!r:.80}. Copy the file again.")
