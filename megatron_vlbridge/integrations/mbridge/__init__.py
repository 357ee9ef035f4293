"""Importing this registers a bridge for each supported model type with mbridge. Verified with mbridge 0.15.1.

Example: `import megatron_vlbridge.integrations.mbridge`, then `mbridge.AutoBridge.from_pretrained(folder)`.

Raises VLBridgeError where mbridge is not installed. Nothing else in this project imports it.
"""

from megatron_vlbridge import families
from megatron_vlbridge.errors import VLBridgeError

try:
    from mbridge.core.bridge import register_model
except ImportError as error:
    raise VLBridgeError(
        f"megatron_vlbridge.integrations.mbridge: expected the package mbridge, found: {error}. Install it: "
        "pip install --no-deps mbridge==0.15.1"
    ) from error

from megatron_vlbridge.integrations.mbridge.bridge import VLBridge

__all__ = ["VLBridge"]

register_model([family.config.model_type for family in families.FAMILIES])(VLBridge)
