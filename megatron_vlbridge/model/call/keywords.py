"""Keywords of other frameworks' calls."""

from collections.abc import Mapping
from typing import Any

from megatron_vlbridge.errors import VLBridgeError

# They would change nothing: the tower always runs, and `witness_ids` is for kernels that are not used here.
HARMLESS = ("force_vit_image", "force_vit_video", "witness_ids")


def check_keywords(others: Mapping[str, Any]) -> None:
    """Reject keywords of a call that would change its result; those that are None or harmless are accepted.

    Raises VLBridgeError, naming them all.
    Example: `check_keywords({"force_vit_image": True, "inference_params": None})`.
    """
    unsupported = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    if unsupported:
        raise VLBridgeError(
            f"Qwen3VLModel.forward does not take the arguments {', '.join(unsupported)}, which may change the result "
            "elsewhere; correct their names or leave them out (docs/frameworks.md lists what it takes)"
        )
