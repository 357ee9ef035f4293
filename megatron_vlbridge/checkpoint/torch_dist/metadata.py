"""DCP's `.metadata`, read from a file that is not trusted."""

from pathlib import Path
from typing import cast

from torch.distributed.checkpoint import metadata as dcp

from megatron_vlbridge.checkpoint.stream.json_file import is_plain
from megatron_vlbridge.checkpoint.torch_dist.unpickler import restricted_loads, shown
from megatron_vlbridge.errors import VLBridgeError

_LONGEST = 1000


def read_metadata(path: Path) -> dcp.Metadata:
    """The metadata of a checkpoint. The types of its two tables and the names are checked, not what the tables hold.

    The file is not trusted: see `restricted_loads`.

    Raises VLBridgeError, naming the file, where it cannot be read or is anything else than such a pickle.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VLBridgeError(f"{path}: expected a readable file, found: {error}. Copy the folder again.") from error
    try:
        metadata = restricted_loads(content)
    # A broken pickle may raise anything: struct, memory and recursion errors among others.
    except Exception as error:
        found = f"{error}" or type(error).__name__
        raise VLBridgeError(f"{path}: expected DCP's metadata, found: {found}. Do not trust this folder.") from error
    _check(path, metadata)
    return cast(dcp.Metadata, metadata)


def _check(path: Path, metadata: object) -> None:
    entries, places = (getattr(metadata, key, None) for key in ("state_dict_metadata", "storage_data"))
    for what, expected, value in (
        ("the pickle", dcp.Metadata, metadata),
        ("state_dict_metadata", dict, entries),
        ("storage_data", dict, places),
    ):
        if not isinstance(value, expected) or value == {}:
            found = "an empty one" if value == {} else shown(value)
            text = f"expected a {expected.__name__}, found {found}"
            raise VLBridgeError(f"{path}: {what}: {text}. Do not trust this folder.")
    for name in entries or ():
        if not isinstance(name, str) or not is_plain(name) or len(name) > _LONGEST:
            text = f"expected names of at most {_LONGEST} printable characters, found {shown(name)}"
            raise VLBridgeError(f"{path}: state_dict_metadata: {text}. Do not trust this folder.")
