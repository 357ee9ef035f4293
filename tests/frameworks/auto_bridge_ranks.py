"""What runs inside the workers: verl's own `make_megatron_module` on a provider of this project's `AutoBridge`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import transformers
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_vlbridge.checkpoint.live.shards import modules_of
from megatron_vlbridge.integrations import AutoBridge
from tests import reference
from tests.functional import call_ranks
from tests.functional.auto_bridge_ranks import parallel_sizes
from tests.functional.pool import Layout


class AutoMapping:
    """verl registers its head with Megatron-Bridge's own, of which this project reads nothing."""

    @staticmethod
    def register_module_type(name: str, kind: str) -> None:
        """Does nothing."""


def create_ddp_config(
    *, wrap_with_ddp: bool, use_distributed_optimizer: bool, use_megatron_fsdp: bool, overrides: Any
) -> DistributedDataParallelConfig | None:
    """As Megatron-Bridge's."""
    assert wrap_with_ddp
    assert not use_megatron_fsdp
    return DistributedDataParallelConfig(use_distributed_optimizer=use_distributed_optimizer, **(overrides or {}))


def as_megatron_bridge() -> dict[str, ModuleType]:
    """What verl imports from Megatron-Bridge."""
    names = {
        "megatron.bridge": {"AutoBridge": AutoBridge},
        "megatron.bridge.models": {},
        "megatron.bridge.models.conversion": {},
        "megatron.bridge.models.conversion.param_mapping": {"AutoMapping": AutoMapping},
        "megatron.bridge.training": {},
        "megatron.bridge.training.utils": {},
        "megatron.bridge.training.utils.config_utils": {"create_ddp_config": create_ddp_config},
    }
    modules = {}
    for name, content in names.items():
        modules[name] = ModuleType(name)
        modules[name].__dict__.update(content, __path__=[])
    return modules


def verl(layout: Layout, folder: Path, conversations: Sequence[reference.Conversation], critic: bool) -> dict[str, Any]:
    """A model as `MegatronEngine` of verl 0.9.1 makes it, and a training step, or a critic's values."""
    with mock.patch.dict(sys.modules, as_megatron_bridge()):
        from verl.models.mcore.bridge import AutoBridge as VerlsBridge
        from verl.utils.megatron_utils import McoreModuleWrapperConfig, make_megatron_module

        bridge = VerlsBridge.from_hf_pretrained(str(folder), trust_remote_code=False)
        provider = bridge.to_megatron_provider(load_weights=False)
        overrides = parallel_sizes(layout) | {"variable_seq_lengths": True, "moe_router_load_balancing_type": "none"}
        if critic and hasattr(provider, "share_embeddings_and_output_weights"):
            overrides["share_embeddings_and_output_weights"] = False
        provider.apply_overrides_and_finalize(dtype=torch.float32, overrides=overrides)
        module, config = make_megatron_module(
            wrap_config=McoreModuleWrapperConfig(
                is_value_model=critic, use_distributed_optimizer=layout.dp * layout.cp == 1
            ),
            tf_config=None,
            hf_config=transformers.AutoConfig.from_pretrained(folder),
            bridge=bridge,
            provider=provider,
        )
    assert isinstance(bridge, AutoBridge)
    assert config.variable_seq_lengths
    head = [name for name, _ in modules_of(module)[-1].named_parameters() if "output_layer" in name]
    bridge.load_hf_weights(module, str(folder), allowed_mismatched_params=["output_layer.weight"] if critic else [])
    if not critic:
        return call_ranks.train(layout, module, "verl_thd", conversations, mean=True)
    for chunk in modules_of(module):
        if chunk.post_process:
            chunk.output_layer.weight.data = call_ranks.value_weight(config.hidden_size)
    return {"values": call_ranks.critic_values(layout, module[0], conversations), "head": head}
