"""What a model stores and loads: its own weights, or with adapters these alone."""

from typing import Any

from megatron.core.transformer.module import MegatronModule

from megatron_vlbridge.backends.te import without_extra_states
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.lora.entries import AdapterShard, adapter_entries, adapter_shards


class AdapterState(MegatronModule):
    """A module whose state is that of its adapters, once it has some."""

    lora: Any = None
    """What `model.lora.attach.add_lora` has added; None for a model without adapters."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `MegatronModule.sharded_state_dict`; of a model with adapters the entries are those of the adapters."""
        return self.base_sharded_state_dict(*args, **kwargs) if self.lora is None else {**adapter_entries(self)}

    def base_sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The entries of the checkpoint's own weights, which are the same on every backend."""
        return without_extra_states(super().sharded_state_dict(*args, **kwargs))

    def adapter_shards(self) -> list[AdapterShard]:
        """What this rank has of the adapters of the model; none without `add_lora`."""
        return adapter_shards(self)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """See `torch.nn.Module.load_state_dict`; a model with adapters takes theirs alone."""
        if self.lora is None or not strict:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        expected = adapter_entries(self).keys()
        if state_dict.keys() != expected:
            names = sorted(state_dict.keys() ^ expected)
            raise VLBridgeError(
                f"the adapters of the model: expected the {len(expected)} tensors of its targets, found "
                f"{len(state_dict)}, of which {names[0]} is in only one of both. Use the same targets."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)
