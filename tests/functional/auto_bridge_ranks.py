"""What runs inside the workers: the calls of frameworks on a bridge, rebuilt from their sources of August 2026."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import get_model_config

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.integrations import AutoBridge
from tests import reference
from tests.functional import call_ranks
from tests.functional.pool import Layout

Conversations = Sequence[reference.Conversation]


def verl(layout: Layout, folder: Path, conversations: Conversations, target: Path) -> dict[str, Any]:
    """verl 0.9.1: `MegatronEngine._build_tf_config`, `make_megatron_module`, `get_per_tensor_param`, its saver."""
    bridge = AutoBridge.from_hf_pretrained(str(folder), trust_remote_code=False)
    provider = bridge.to_megatron_provider(load_weights=False)
    overrides = parallel_sizes(layout) | {
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": False,
        "variable_seq_lengths": True,
        # verl's own value is flash, over which its user sets this.
        "attention_backend": AttnBackend.auto,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
    }
    provider.apply_overrides_and_finalize(dtype=torch.float32, overrides=overrides)
    frozen: list[int] = []
    provider.register_pre_wrap_hook(lambda chunks: frozen.append(len(chunks)))
    module = provider.provide_distributed_model(
        wrap_with_ddp=True,
        ddp_config=ddp_config(layout),
        fp16=provider.fp16,
        bf16=provider.bf16,
        use_megatron_fsdp=False,
    )
    assert frozen == [layout.vpp]
    assert get_model_config(module[0]).variable_seq_lengths
    bridge.load_hf_weights(module, str(folder), allowed_mismatched_params=[])
    found = call_ranks.train(layout, module, "verl_thd", conversations, mean=True)
    assert getattr(bridge, "export_weight_dtype", None) is None
    tasks = bridge.get_conversion_tasks(module)
    # The tasks are made once and used for every sync.
    exported = [list(bridge.export_hf_weights(module, conversion_tasks=tasks)) for _ in range(2)][1]
    target.mkdir(exist_ok=True)
    bridge.save_hf_weights(module, str(target), strict=True)
    if torch.distributed.get_rank() == 0:
        bridge.hf_pretrained.config.save_pretrained(target)
    return found | {"exported": exported}


def verl_critic(layout: Layout, folder: Path, conversations: Conversations) -> dict[str, Any]:
    """verl 0.9.1 with `is_value_model`: a head that is not tied, set by the hook of `make_value_model`."""
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider(load_weights=False)
    overrides = parallel_sizes(layout) | {"variable_seq_lengths": True}
    if hasattr(provider, "share_embeddings_and_output_weights"):
        overrides["share_embeddings_and_output_weights"] = False
    provider.apply_overrides_and_finalize(dtype=torch.float32, overrides=overrides)

    def value_head(chunks: list[Any]) -> None:
        if parallel_state.is_pipeline_last_stage():
            chunks[-1].output_layer = call_ranks.ValueHead(chunks[-1].config)

    provider.register_pre_wrap_hook(value_head)
    (model,) = provider.provide_distributed_model(ddp_config=ddp_config(layout), fp16=False, bf16=False)
    errors = []
    for allowed in ([], ["*.bias"], ["output_layer.weight"]):
        try:
            bridge.load_hf_weights([model], str(folder), allowed_mismatched_params=allowed)
        except VLBridgeError as error:
            errors.append(str(error))
    return {"errors": errors, "values": call_ranks.critic_values(layout, model, conversations)}


def miles(layout: Layout, folder: Path, conversations: Conversations, target: Path) -> dict[str, Any]:
    """miles 31f1ca9: `get_model_provider_func` in Megatron's `get_model`, `_load_checkpoint_hf`, `save_hf_model`."""
    bridge = AutoBridge.from_hf_pretrained(str(folder), trust_remote_code=True)
    provider = bridge.to_megatron_provider(load_weights=False)
    arguments = parallel_sizes(layout) | {
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        "attention_softmax_in_fp32": True,
        "fp32_residual_connection": False,
        "deterministic_mode": False,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "recompute_modules": None,
        "cpu_offloading_num_layers": 0,
        "distribute_saved_activations": False,
        "tp_comm_overlap": False,
        "fp8": None,
        "fp8_recipe": "delayed",
        "attention_backend": AttnBackend.auto,
        "moe_token_dispatcher_type": "alltoall",
    }
    for name, value in arguments.items():
        setattr(provider, name, value)
    assert not hasattr(provider, "dsa_attention_backend")
    for name in ("params_dtype", "pipeline_dtype"):
        assert getattr(provider, name) == torch.float32
    provider.finalize()
    groups = parallel_state.get_pipeline_model_parallel_group()
    wrapped = []
    for stage in range(layout.vpp):
        provider._pg_collection = call_ranks.ProcessGroupCollection.use_mpu_process_groups()
        model = provider.provide(
            pre_process=groups.rank() == 0 and stage == 0,
            post_process=groups.rank() == layout.pp - 1 and stage == layout.vpp - 1,
            vp_stage=stage if layout.vpp > 1 else None,
        )
        model.forward = logits_only(model.forward)
        wrapped.append(DistributedDataParallel(model.config, DistributedDataParallelConfig(), model))
    AutoBridge.from_hf_pretrained(str(folder), trust_remote_code=True).load_hf_weights(wrapped)
    found = call_ranks.train(layout, wrapped, "slime", conversations)
    target.mkdir(exist_ok=True)
    torch.distributed.barrier()
    bridge.save_hf_pretrained(wrapped, path=target)
    return found | {"exported": list(bridge.export_hf_weights(wrapped))}


def logits_only(forward: Any) -> Any:
    """As miles replaces the `forward` of a model."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return wrapped


def nemo_rl(layout: Layout, folder: Path, conversations: Conversations, target: Path) -> dict[str, Any]:
    """NeMo-RL 7ea279a: `import_model_from_hf_name`, `_calculate_refit_param_info`, `export_model_from_megatron`."""
    bridge = AutoBridge.from_hf_pretrained(str(folder), trust_remote_code=True)
    provider = bridge.to_megatron_provider(load_weights=True)
    before = {name: getattr(provider, name) for name in parallel_sizes(layout)}
    assert set(before.values()) == {1, None, False}
    for name, value in parallel_sizes(layout).items():
        setattr(provider, name, value)
    provider.num_layers_in_first_pipeline_stage = provider.num_layers_in_last_pipeline_stage = None
    provider.pipeline_dtype = torch.float32
    provider.gradient_accumulation_fusion = False
    provider.calculate_per_token_loss = provider.parallel_output = True
    # NeMo-RL gives its schedule the length of the packs instead.
    provider.variable_seq_lengths = True
    provider.finalize()
    seen: list[int] = []
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, post_wrap_hook=lambda x: seen.append(len(x)))
    assert seen == [1]
    (model,) = [DistributedDataParallel(x.config, DistributedDataParallelConfig(), x) for x in chunks]  # type: ignore[arg-type]
    found = call_ranks.train(layout, [model], "nemo_rl", conversations)
    tasks = [task for task in bridge.get_conversion_tasks([model]) if task is not None]
    sizes = [(task.param_name, size_of(task)) for task in tasks]
    exported = list(bridge.export_hf_weights([model], show_progress=False, conversion_tasks=tasks))
    assert sum(size for _, size in sizes) == sum(x.nbytes for _, x in exported)
    assert len({name for name, _ in sizes}) == len(sizes)
    bridge.save_hf_pretrained([model], str(target), strict=True)
    return found | {"exported": exported, "sizes": sizes}


def size_of(task: Any) -> int:
    """What a stage that has the parameter computes, and sends to the others; only one may have it."""
    mapping, mine = task.mapping, None
    if task.param_weight is not None:
        size = task.param_weight.numel() * task.param_weight.element_size() * mapping.tp_size
        mine = size * (mapping.ep_size if mapping.is_expert else 1)
    stages: list[int | None] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    torch.distributed.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
    (size,) = [size for size in stages if size is not None]
    return size


def sky_rl(layout: Layout, folder: Path, conversations: Conversations, target: Path) -> dict[str, Any]:
    """SkyRL a956457: `init_configs`, `make_megatron_module`, `MegatronWeightExtractor`, `save_hf_model`."""
    bridge = AutoBridge.from_hf_pretrained(str(folder), trust_remote_code=True)
    provider = bridge.to_megatron_provider()
    settings = parallel_sizes(layout) | {
        "mtp_num_layers": None,
        "pipeline_dtype": torch.float32,
        # With flash_attn=False.
        "attention_backend": "fused",
        "variable_seq_lengths": True,
        "masked_softmax_fusion": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": True,
        "moe_enable_routing_replay": False,
    }
    for name, value in settings.items():
        setattr(provider, name, value)
    assert not getattr(provider, "mtp_num_layers", None)
    provider.finalize()
    module = provider.provide_distributed_model(ddp_config=ddp_config(layout), wrap_with_ddp=True, bf16=False)
    found = call_ranks.train(layout, module, "sky_rl", conversations, mean=True)
    whole = list(bridge.export_hf_weights(module, show_progress=False, conversion_tasks=None))
    bounds, room = [0], 0
    for index, task in enumerate(bridge.get_conversion_tasks(module)):
        assert not getattr(task.mapping, "is_grouped_export", False)
        room += size_of(task)
        if room > 2**15:
            bounds.append(index + 1)
            room = 0
    assert len(bounds) > 5
    fresh = bridge.get_conversion_tasks(module)
    exported = [
        item
        for start, end in zip(bounds, [*bounds[1:], len(fresh)], strict=True)
        for item in bridge.export_hf_weights(module, show_progress=False, conversion_tasks=fresh[start:end])
    ]
    assert [name for name, _ in exported] == [name for name, _ in whole]
    if torch.distributed.get_rank() == 0:
        target.mkdir()
    torch.distributed.barrier()
    bridge.save_hf_weights(module, target, strict=False, distributed_save=True, save_every_n_ranks=1)
    if torch.distributed.get_rank() == 0:
        bridge.hf_pretrained.save_artifacts(target)
    assert bridge.hf_pretrained.model_name_or_path == str(folder)
    return found | {"exported": exported}


def areal(layout: Layout, folder: Path, conversations: Conversations, target: Path) -> dict[str, Any]:
    """AReaL 4aef98d: `make_hf_and_mcore_config`, `make_mcore_model`, `_load_model_from_hf`, `_save_model_to_hf`."""
    bridge = AutoBridge.from_hf_pretrained(str(folder), trust_remote_code=True, dtype="float32")
    hf_config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)
    assert hf_config.model_type
    config, provider = bridge.transformer_config, bridge.to_megatron_provider(load_weights=False)
    for name, value in parallel_sizes(layout).items():
        setattr(provider, name, value)
    provider.pipeline_dtype = config.params_dtype
    provider.account_for_embedding_in_pipeline_split = provider.account_for_loss_in_pipeline_split = False
    provider.variable_seq_lengths = True
    provider.moe_token_dispatcher_type = "alltoall"
    provider.batch_p2p_comm = provider.overlap_p2p_comm = False
    provider.finalize()
    models = provider.provide_distributed_model(
        ddp_config=ddp_config(layout),
        fp16=config.fp16,
        bf16=config.bf16,
        use_megatron_fsdp=False,
        use_torch_fsdp2=False,
        wrap_with_ddp=True,
        overlap_param_gather_with_optimizer_step=False,
    )
    bridge.load_hf_weights(models, hf_path=str(folder))
    found = call_ranks.train(layout, models, "verl_bshd", conversations, mean=True)
    target.mkdir(exist_ok=True)
    bridge.save_hf_pretrained(models, str(target), source_path=str(folder))
    return found | {"exported": list(bridge.export_hf_weights(models, cpu=True))}


def parallel_sizes(layout: Layout) -> Mapping[str, Any]:
    """The fields of a layout."""
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sp,
    }


def ddp_config(layout: Layout) -> DistributedDataParallelConfig:
    """With the distributed optimizer, as frameworks have it, where one rank gets the whole gradients all the same."""
    return DistributedDataParallelConfig(use_distributed_optimizer=layout.dp * layout.cp == 1)


LIVES = {life.__name__: life for life in (verl, miles, nemo_rl, sky_rl, areal)}


def live(layout: Layout, name: str, **arguments: Any) -> dict[str, Any]:
    """What the framework of this name does."""
    with mock.patch.dict(os.environ):
        # Megatron notes there the attention backend of the first model, for the whole process.
        for variable in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
            os.environ.pop(variable, None)
        return LIVES[name](layout, **arguments)
