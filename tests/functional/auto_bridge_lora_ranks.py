"""What runs inside the workers: a bridge and adapters, and what a bridge rejects."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_vlbridge.checkpoint.live.shards import modules_of
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.integrations import AutoBridge
from megatron_vlbridge.model.lora.attach import add_lora
from megatron_vlbridge.model.lora.entries import adapter_shards
from megatron_vlbridge.training.batch import read_pack
from megatron_vlbridge.training.guards import check_model
from tests.functional import lora_ranks, ranks
from tests.functional.auto_bridge_ranks import parallel_sizes
from tests.functional.pool import Layout

FP32, BF16 = {"fp16": False, "bf16": False}, {"bf16": True}


def provider_of(layout: Layout, bridge: AutoBridge, load_weights: bool = False) -> Any:
    """For this layout."""
    provider = bridge.to_megatron_provider(load_weights=load_weights)
    overrides = parallel_sizes(layout) | {"variable_seq_lengths": True}
    return provider.apply_overrides_and_finalize(dtype=torch.float32, overrides=overrides)


def adapted(layout: Layout, folder: Path, lora: Mapping[str, Any], target: Path, bf16: bool = False) -> dict[str, Any]:
    """Adapters by a hook before the weights are loaded; then all that comes out."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = provider_of(layout, bridge)
    provider.register_pre_wrap_hook(lambda chunks: ranks.add_adapters(chunks, **lora))
    model = provider.provide_distributed_model(ddp_config=DistributedDataParallelConfig(), **(BF16 if bf16 else FP32))
    assert bridge.load_hf_weights(model) is model
    trained = [name for chunk in model for name, p in chunk.named_parameters() if p.requires_grad]
    found = {
        "merged": list(bridge.export_hf_weights(model, cpu=True, show_progress=False)),
        "base": list(bridge.export_hf_weights(model, merge_adapter_weights=False)),
        "adapters": list(bridge.export_adapter_weights(model, cpu=False)),
        "trained": all("_lora." in name for name in trained) and bool(trained),
    }
    tasks = bridge.get_conversion_tasks(model)
    found["of tasks"] = list(bridge.export_hf_weights(model, conversion_tasks=[None, *tasks[3:5]]))
    found["names"] = [name for task in tasks[3:5] for name in task.names]
    settings = SimpleNamespace(dim=lora["rank"], alpha=lora["alpha"])
    bridge.save_hf_adapter(model, target / "adapter", peft_config=settings, base_model_name_or_path="the base")
    bridge.save_hf_pretrained(model, target / "merged")
    return found


def trained(layout: Layout, folder: Path, pack: Mapping[str, torch.Tensor], overlap: bool) -> dict[str, torch.Tensor]:
    """The merged weights after a step of the distributed optimizer, which gathers new values at once or when needed."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = provider_of(layout, bridge, load_weights=True)
    provider.register_pre_wrap_hook(lambda chunks: add_lora(chunks[0], rank=2, alpha=4, targets=["q_proj"]))
    ddp = DistributedDataParallelConfig(
        overlap_grad_reduce=overlap, overlap_param_gather=overlap, use_distributed_optimizer=True
    )
    (model,) = provider.provide_distributed_model(ddp)
    config = OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=True, clip_grad=0.0)
    optimizer = get_megatron_optimizer(config, [model])
    inputs = read_pack({key: value[None] for key, value in pack.items()}, modules_of(model)[0].hf_config)
    model(inputs=inputs).sum().backward()
    model.finish_grad_sync()
    optimizer.step()
    return dict(bridge.export_hf_weights(model))


Case = Callable[[], object]


def said(case: Case) -> str:
    """What a case raises."""
    try:
        case()
    except VLBridgeError as error:
        kinds = [kind.__name__ for kind in (AttributeError,) if isinstance(error, kind)]
        return " ".join([*kinds, str(error)])
    return "accepted"


def settings_refusals(layout: Layout, folder: Path) -> list[str]:
    """What is said about settings of a provider, one after the other."""
    bridge = AutoBridge.from_hf_pretrained(folder)

    def changed(**overrides: object) -> Case:
        provider = bridge.to_megatron_provider(load_weights=False)
        return lambda: provider.apply_overrides_and_finalize(torch.float32, parallel_sizes(layout) | overrides)

    def built(**keywords: object) -> Case:
        return lambda: provider_of(layout, bridge).provide_distributed_model(**keywords)

    def stepped() -> None:
        provider = provider_of(layout, bridge)
        provider.calculate_per_token_loss = False
        check_model(provider.provide())  # as vlm_step does

    ddp = DistributedDataParallelConfig()
    cases = [
        stepped,
        changed(moe_router_dtype="fp32", moe_permute_fusion=True, attention_backend="auto"),
        changed(no_such_setting=1),
        changed(transformer_layer_spec=None),
        changed(attention_backend="flash"),
        changed(attention_backend="fast"),
        changed(num_layers=2),
        built(ddp_config=ddp, use_megatron_fsdp=True),
        built(ddp_config=ddp, mixed_precision_wrapper=None),
        built(),
        built(wrap_with_ddp=False, fp16=True, bf16=True),
        lambda: bridge.push_to_hub,
        lambda: bridge.hf_pretrained.state,
        lambda: AutoBridge.from_hf_pretrained(folder, rope_scaling=2),
    ]
    return [said(case) for case in cases]


def weight_refusals(layout: Layout, folder: Path, lora: Mapping[str, Any], target: Path) -> list[str]:
    """What is said about calls that move weights, one after the other."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = provider_of(layout, bridge, load_weights=True).provide_distributed_model(wrap_with_ddp=False)
    without = AutoBridge.from_hf_config(transformers.AutoConfig.from_pretrained(folder))
    tasks = bridge.get_conversion_tasks(model)
    other = dataclasses.replace(tasks[0], param_weight=torch.zeros(2))
    group = next(task for task in tasks if len(task.names) > 1)
    cut = dataclasses.replace(group, names=group.names[:1])
    rank = torch.distributed.get_rank()
    if rank == 0:
        target.mkdir()
        (target / "model.safetensors").touch()
    torch.distributed.barrier()

    def export(tasks: Any) -> Case:
        return lambda: list(bridge.export_hf_weights(model, conversion_tasks=tasks))

    cases: list[Case] = [
        export([other]),
        export([other if rank else tasks[0]]),
        export(["a task"]),
        export([cut]),
        export(tasks[rank : rank + 1]),
        lambda: without.load_hf_weights(model),
        lambda: without.to_megatron_provider(),
        lambda: without.load_hf_weights(model, folder),
        lambda: bridge.save_hf_pretrained(model, target),
        lambda: bridge.save_hf_weights(model, target),
        lambda: list(bridge.export_adapter_weights(model)),
    ]
    found = [said(case) for case in cases]
    for layer in modules_of(model)[0].language_model.decoder.layers:
        layer.self_attention.linear_proj = lora_ranks.Foreign(layer.self_attention.linear_proj)
    found.append(said(lambda: bridge.export_hf_weights(model)))
    assert len(list(bridge.export_hf_weights(model, merge_adapter_weights=False))) > 50
    again = provider_of(layout, bridge).provide_distributed_model(wrap_with_ddp=False)
    ranks.add_adapters(again, **lora)
    config = SimpleNamespace(dim=lora["rank"], alpha=lora["alpha"] + 1)
    return [*found, said(lambda: bridge.save_hf_adapter(again, target / "adapter", config))]


def incomplete(layout: Layout, folder: Path) -> str:
    """What is said about the tasks of one of two chunks."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = provider_of(layout, bridge).provide_distributed_model(wrap_with_ddp=False)
    return said(lambda: bridge.get_conversion_tasks(model[:1]))


def options(layout: Layout, folder: Path, other: Path, work: Path) -> dict[str, Any]:
    """Hooks in their order, dtypes, another source of the weights, and parameters that ranks initialise otherwise."""
    bridge = AutoBridge.from_hf_config(transformers.AutoConfig.from_pretrained(folder))
    provider, events = bridge.to_megatron_provider(hf_path=other), []
    provider.apply_overrides_and_finalize(overrides=parallel_sizes(layout) | {"parallel_output": False})

    def note(name: str) -> Callable[[list[Any]], None]:
        return lambda chunks: events.append((name, float(word_embeddings(chunks[0]).float().abs().sum())))

    def fill(chunks: list[Any]) -> None:
        word_embeddings(chunks[0]).fill_(1.0 + torch.distributed.get_rank())

    provider.register_pre_wrap_hook(note("second"))
    provider.register_pre_wrap_hook(note("first"), prepend=True)
    provider.register_post_wrap_hook(note("fourth"))
    provider.register_post_wrap_hook(note("third"), prepend=True)
    model = provider.provide_distributed_model(DistributedDataParallelConfig(), bf16=True)
    bridge.save_hf_pretrained(model, work / "saved", source_path=other, weight_dtype=torch.float32)
    loaded = AutoBridge.from_hf_pretrained(folder)
    loaded.save_hf_weights(model, work / "weights", weight_dtype=torch.float32)
    found = {
        "events": events,
        "dtypes": [getattr(provider, name) for name in ("params_dtype", "pipeline_dtype", "autocast_dtype")],
        "parallel_output": modules_of(model)[0].language_model.parallel_output,
        "own": dict(bridge.export_hf_weights(model)),
        "fp32": {tensor.dtype for _, tensor in bridge.export_hf_weights(model, weight_dtype=torch.float32)},
        "half": AutoBridge.from_hf_pretrained(folder, dtype="float16").to_megatron_provider().fp16,
    }
    for key, keywords in {"apart": {"data_parallel_random_init": False}, "broadcast": {}}.items():
        ddp = DistributedDataParallelConfig()
        (chunk,) = provider.provide_distributed_model(
            ddp, pre_wrap_hook=[fill], post_wrap_hook=note(key), bf16=False, **keywords
        )
        found[key] = word_embeddings(modules_of(chunk)[0]).unique().tolist()
        found["kept"] = word_embeddings(modules_of(chunk)[0]).dtype
    return found


def word_embeddings(chunk: Any) -> torch.Tensor:
    """The weight of the embedding."""
    weight: torch.Tensor = modules_of(chunk)[0].language_model.embedding.word_embeddings.weight
    return weight.data


def documented(layout: Layout, folder: Path, code: list[str], work: Path) -> dict[str, Any]:
    """Runs the code of the page, with this folder in the place of the Hub id."""
    names: dict[str, Any] = {}
    with contextlib.chdir(work):
        for part in code:
            exec(part.replace("Qwen/Qwen3-VL-2B-Instruct", str(folder)), names)
    (chunk,) = names["provider"].provide_distributed_model(wrap_with_ddp=False)
    return {"targets": chunk.lora.weights, "config": names["model"][0].config}


def overflow(layout: Layout, folder: Path) -> list[str]:
    """What is said where the sum of a weight and its adapter, on the second rank, is no number in bf16."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = provider_of(layout, bridge).provide_distributed_model(wrap_with_ddp=False, bf16=True)
    add_lora(modules_of(model)[0], rank=1, alpha=1, targets=["q_proj"])
    for shard in adapter_shards(modules_of(model)[0]):
        shard.values.fill_(3e38 if torch.distributed.get_rank() else 0)
    return [said(lambda: bridge.export_hf_weights(model)), said(lambda: bridge.save_hf_pretrained(model, "none"))]


def own_groups(layout: Layout, folder: Path) -> dict[str, Any]:
    """A provider that makes the process groups, after a config of transformers; seeded, so models start alike."""
    bridge = AutoBridge.from_hf_config(transformers.AutoConfig.from_pretrained(folder))
    found, provider = [], provider_of(layout, bridge)
    parallel_state.destroy_model_parallel()
    missing = said(lambda: provider.provide_distributed_model(wrap_with_ddp=False))
    for _ in range(2):
        provider.initialize_model_parallel(seed=7)
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        found.append(dict(bridge.export_hf_weights(model)))
        size = parallel_state.get_tensor_model_parallel_world_size()
        parallel_state.destroy_model_parallel()
    return {"missing": missing, "size": size, "weights": found}
