"""Transformer Engine's kernels; attention takes packs (THD) through `PackedSegments`."""

from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider

from megatron_vlbridge.errors import VLBridgeError


def spec_provider() -> BackendSpecProvider:
    """Megatron-Core's Transformer Engine provider.

    Raises:
        VLBridgeError: where Transformer Engine cannot be imported.
    """
    if not HAVE_TE:
        raise VLBridgeError(
            "the Transformer Engine backend needs the package transformer-engine, which cannot be imported here. "
            "Install the extra 'te' on a machine with a GPU, or call cpu_runtime.enable() first to use the CPU backend"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def without_extra_states(entries: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state dict whose modules keep their extra states to themselves.

    Only FP8, which is refused, would put something into them. Megatron's loader fails where a checkpoint lacks the
    empty ones, as one from the CPU backend does.

    Example:
        >>> entries = without_extra_states(model.decoder.sharded_state_dict())
    """
    return {
        name: LocalNonpersistentObject(entry.data)
        if isinstance(entry, ShardedObject) and entry.key.endswith("._extra_state")
        else entry
        for name, entry in entries.items()
    }
