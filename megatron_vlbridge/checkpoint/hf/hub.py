"""A folder by its path, or by the name that the Hugging Face Hub knows it under."""

import re
from pathlib import Path

from megatron_vlbridge.checkpoint.formats import reject_file
from megatron_vlbridge.errors import VLBridgeError

_REPOSITORY = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Weights in other formats are not read, so they are not fetched.
_WEIGHTS = "*.safetensors"
_OTHERS = ["*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*"]


def find_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder that `name` is: a path, or a Hub id such as `Qwen/Qwen3-VL-2B-Instruct`, `...@revision` if need be.

    A path that exists comes first. An id is looked up through huggingface_hub: its cache, its login, its offline mode
    (`HF_HUB_OFFLINE=1`); what the cache lacks is downloaded into it, `weights` only where they are wanted.

    Raises VLBridgeError where there is no such folder and the Hub does not give it.
    Example: `find_folder("Qwen/Qwen3-VL-2B-Instruct")` is the snapshot's folder in the cache.
    """
    path = Path(name)
    match = _REPOSITORY.fullmatch(name) if isinstance(name, str) else None
    if str(name) and path.is_dir():
        return path
    reject_file(path)
    if match is None:
        raise VLBridgeError(f"{name}: expected a folder or the id of a Hub repository, found neither. Check the name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = [_WEIGHTS, *_OTHERS] if weights else _OTHERS
    try:
        return Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise VLBridgeError(
            f"{name}: expected a folder of this path, found none, and the Hub does not give it: {error} "
            "Check the name, the login and the network, or download it first."
        ) from error
