"""What mbridge's interface has and this project does not offer."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.integrations.auto_bridge.unsupported import NotOfferedError

# Source: `mbridge.core.util.get_model` of mbridge 0.15.1, which reads them for FSDP alone.
_WITHOUT_EFFECT = frozenset({"use_precision_aware_optimizer", "use_cpu_initialization"})
_REMEDIES = {
    "use_torch_fsdp2": "Use DDP with the distributed optimizer.",
    "use_custom_fsdp": "Use DDP with the distributed optimizer.",
    "optimizer_config": "Give ddp_config.",
    "extra_provider_args": "Use post_model_creation_callbacks.",
}


def check_keywords(others: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Reject keywords that mbridge's `function` does not have, or that are not its defaults and would change the model.

    Example: `check_keywords({"use_torch_fsdp2": False, "use_cpu_initialization": True}, Bridge.get_model)`.
    """
    known = inspect.signature(function).parameters
    for name, value in others.items():
        if name not in known or not (name in _WITHOUT_EFFECT or value == known[name].default):
            raise VLBridgeError(
                f"{function.__name__}: {name}={value!r} is not supported. {_REMEDIES.get(name, 'Leave it out.')}"
            )


def missing_attribute(name: str, interface: Collection[str]) -> AttributeError:
    """The error for an attribute that a bridge does not have; `interface` are those of mbridge's."""
    if name not in interface:
        return AttributeError(f"'VLBridge' object has no attribute {name!r}")
    return NotOfferedError(
        f"{name}: mbridge's conversion of single parameters is not offered. Use load_weights, export_weights and "
        "save_weights, which convert whole models."
    )
