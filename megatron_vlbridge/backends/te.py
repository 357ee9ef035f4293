"""Checkpoint entries of Transformer Engine's modules."""

from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject


def without_extra_states(entries: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state dict whose modules' extra states are neither stored nor loaded.

    Only FP8, which is rejected, would use them. Megatron's loader fails where a checkpoint has no such entries, as
    one from the CPU backend.

    Example:
        >>> entries = without_extra_states(model.decoder.sharded_state_dict())
    """
    return {
        name: LocalNonpersistentObject(entry.data)
        if isinstance(entry, ShardedObject) and entry.key.endswith("._extra_state")
        else entry
        for name, entry in entries.items()
    }
