"""JSON files, names and sizes that are not trusted."""

import json
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from megatron_vlbridge.errors import VLBridgeError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_SIZE = 2**63  # of a dim of a torch tensor
_MAX_DIMS = 64
_LONGEST_FILE_NAME = 255
_LONGEST_PATH = 1024
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")


def is_plain(name: str) -> bool:
    """Whether a name has no control characters, which files and terminals take amiss, and can be written as UTF-8."""
    return not _UNPRINTABLE.search(name)


def is_file_name(value: object, suffix: str) -> TypeGuard[str]:
    """Whether a value names a file with this suffix in the folder itself."""
    if not isinstance(value, str) or not is_plain(value) or len(value) > _LONGEST_FILE_NAME:
        return False
    return re.fullmatch(r"[^/\\]+" + re.escape(suffix), value) is not None


def is_file_path(value: object, suffix: str) -> TypeGuard[str]:
    """Whether a value names a file with this suffix in the folder or below it."""
    if not isinstance(value, str) or len(value) > _LONGEST_PATH:
        return False
    *folders, name = value.split("/")
    return is_file_name(name, suffix) and all(is_file_name(f, "") and f not in (".", "..") for f in folders)


def are_sizes(value: object, kind: type[list[Any]] | type[tuple[Any, ...]]) -> TypeGuard[Sequence[int]]:
    """Whether a value of this kind holds sizes or offsets that a tensor of torch can have."""
    if not isinstance(value, kind) or len(value) > _MAX_DIMS:
        return False
    return all(type(item) is int and 0 <= item < MAX_SIZE for item in value)


def load_json_object(path: Path, text: bytes | None = None) -> dict[str, Any]:
    """A JSON object without duplicate or unprintable names, from a file or from bytes that `path` is named for."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise VLBridgeError(f"{path}: expected every name once, found {twice!r:.80} twice. Fetch the file again.")
        if not is_plain("".join(result)):
            name = next(name for name in result if not is_plain(name))
            raise VLBridgeError(f"{path}: expected printable names, found {name!r:.80}. Do not trust this file.")
        return result

    try:
        if text is None:
            if regular_size(path) > MAX_HEADER:
                raise OSError(f"a file of more than {MAX_HEADER} bytes")
            text = path.read_bytes()
        value = json.loads(text, object_pairs_hook=checked)
    except VLBridgeError:
        raise
    # ValueError is bytes that are no text, text that is no JSON, or an integer of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise VLBridgeError(f"{path}: expected JSON, found: {error}. Fetch the file again.") from error
    if not isinstance(value, dict):
        raise VLBridgeError(f"{path}: expected a JSON object, found {type(value).__name__}. Fetch the file again.")
    return value


def regular_size(path: Path) -> int:
    """A file's length; OSError for a pipe or device, whose reading may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    return status.st_size
