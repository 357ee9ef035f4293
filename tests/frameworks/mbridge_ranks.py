"""What runs inside the workers: the methods of a bridge that mbridge's `AutoBridge` gave."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mbridge import AutoBridge
from mbridge.core.parallel_states import ParallelStates
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import ModelType
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.utils import get_attr_wrapped_model
from transformers import AutoConfig, Qwen3Config
from verl.utils.megatron_utils import unwrap_model

import megatron_vlbridge.integrations.mbridge  # noqa: F401  registers
from megatron_vlbridge.checkpoint.live import export_hf_weights
from megatron_vlbridge.checkpoint.live.adapters import export_adapter_weights
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.lora.attach import add_lora
from megatron_vlbridge.training.guards import check_model
from tests.frameworks import verl_ranks
from tests.functional.call_ranks import value_weight
from tests.functional.pool import Layout


def out(layout: Layout, folder: Path, target: Path, prepared: bool) -> dict[str, Any]:
    """The exported tensors (rank 0) and their names; then weights twice as large are saved.

    `prepared`: where verl has put its own files before, as its checkpoint manager does.
    """
    bridge, chunks = verl_ranks.build(folder)
    bridge.hf_config.name_or_path = ""  # the folder that was loaded comes first
    exported = {name: tensor.clone() for name, tensor in bridge.export_weights(chunks)}
    names, rank = list(exported), torch.distributed.get_rank()
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.mul_(2)
    if rank == 0 and prepared:
        bridge.hf_config.save_pretrained(target)
        (target / "chat_template.jinja").write_text("verl's")
    torch.distributed.barrier()
    bridge.save_weights(chunks, str(target))
    return {"names": names, "tensors": exported if rank == 0 else {}}


def adapted(layout: Layout, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What a bridge exports of a model with adapters, the weights of its base, and the adapters."""

    def adapt(model: Any, **_: object) -> None:
        add_lora(model, rank=2, alpha=6, targets=["q_proj"])
        for name, parameter in model.named_parameters():
            if "_lora." in name:
                parameter.data.fill_(0.5)

    bridge = AutoBridge.from_pretrained(str(folder), dtype=torch.float32)
    chunks = bridge.get_model(folder, post_model_creation_callbacks=[adapt])
    return {
        "merged": dict(bridge.export_weights(chunks)),
        "base": dict(export_hf_weights(chunks)),
        "adapters": dict(export_adapter_weights(chunks)),
    }


def documented(layout: Layout, folder: Path, code: str) -> dict[str, torch.Tensor]:
    """The weights that the lines of the page export; they save into a folder beside this one."""
    names = {"torch": torch, "folder": folder}
    exec(code.replace('"trained"', f'"{folder}-trained"'), names)
    return dict(names["weights"])


def critic(layout: Layout, folder: Path, form: str, conversations: verl_ranks.Conversations) -> dict[str, Any]:
    """The values of all tokens (last stage) from a head that is set before the weights are loaded again; errors."""
    bridge, chunks = verl_ranks.build(folder, value_model=True)
    for module in unwrap_model(chunks):
        if module.post_process:
            module.output_layer.weight.data.copy_(value_weight(module.config.hidden_size))
    bridge.load_weights(chunks, folder)
    values = []

    def step(batches: Iterator[tuple[verl_ranks.Conversations, torch.Tensor]], model: torch.nn.Module) -> Any:
        output = verl_ranks.FORMS[form](model, next(batches)[0], value_model=True)
        if get_attr_wrapped_model(model, "post_process"):
            values.extend(row.detach() for row in (output if isinstance(output, list) else output.unbind()))
        return output, lambda _: (torch.zeros(()), {})

    verl_ranks.schedule(step, chunks, conversations, forward_only=True)
    calls = (lambda: bridge.export_weights(chunks), lambda: bridge.save_weights(chunks, folder / "critic"))
    return {"values": values, "errors": [error(call) for call in calls]}


def error(call: Callable[[], Any]) -> str:
    """The text of a VLBridgeError."""
    try:
        call()
    except VLBridgeError as failure:
        return str(failure)
    return "accepted"


def frozen(layout: Layout, folder: Path) -> list[str]:
    """The parameters of this rank that `freeze_moe_router` leaves without a gradient."""
    _, chunks = verl_ranks.build(folder, freeze_router=True)
    named = (item for module in unwrap_model(chunks) for item in module.named_parameters())
    return [name for name, parameter in named if not parameter.requires_grad]


def configs(layout: Layout, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Field by field, the config of a bridge of this project, and that of mbridge's own for a Qwen3."""
    text = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    theirs = AutoBridge.from_config(Qwen3Config(**text)).config
    ours = AutoBridge.from_pretrained(folder).config
    names = [field.name for field in dataclasses.fields(theirs)]
    return {name: (getattr(ours, name), getattr(theirs, name)) for name in names}


def extra_args(layout: Layout, folder: Path) -> list[tuple[Any, ...]]:
    """Of the config after each call of `set_extra_args`, the last of which fails, the fields that they set."""
    bridge, found = AutoBridge.from_pretrained(folder), []
    for fields in ({"recompute_granularity": "selective"}, {"attention_backend": "fused"}, {"magic": 1}):
        error(lambda given=fields: bridge.set_extra_args(**given))
        config = bridge.config
        found.append((config.recompute_granularity, config.attention_backend, config.variable_seq_lengths))
    return found


def wrapped(layout: Layout, folder: Path) -> dict[str, Any]:
    """How `get_model` wraps, and whether the ranks have the same random weights with and without a broadcast."""
    bridge = AutoBridge.from_pretrained(folder)
    model_parallel_cuda_manual_seed(torch.distributed.get_rank())
    result: dict[str, Any] = {}
    for broadcast in (False, True):
        (chunk,) = bridge.get_model(wrap_with_ddp=True, bf16=True, data_parallel_random_init=broadcast)
        result[f"broadcast {broadcast}"] = unwrap_model(chunk).language_model.decoder.layers[0].mlp.linear_fc1.weight
    (plain,) = bridge.get_model(folder, ddp_config={"overlap_grad_reduce": True})
    (other,) = bridge.get_model(wrap_with_ddp=True, ddp_config={"use_distributed_optimizer": False})
    layers = [chunk, chunk.module, chunk.module.module]
    return result | {
        "classes": [type(layer).__name__ for layer in layers],
        "plain": [type(plain).__name__, type(plain.module).__name__],
        "ddp": [(x.use_distributed_optimizer, x.grad_reduce_in_fp32) for x in (chunk.ddp_config, other.ddp_config)],
        "dtype": {parameter.dtype for parameter in plain.parameters()},
        "loaded": plain.module.language_model.embedding.word_embeddings.weight,
    }


def rejected(layout: Layout, folder: Path) -> dict[str, str]:
    """What each of these calls says, by its name in the test."""
    hf_config = AutoConfig.from_pretrained(folder)
    unnamed = AutoConfig.from_pretrained(folder)
    unnamed.name_or_path = ""
    fp32 = {"dtype": torch.float32}

    def bridge(**extra_args: Any) -> Any:
        made = AutoBridge.from_config(hf_config, **fp32)
        made.set_extra_args(**extra_args)
        return made

    def routing_replay() -> None:
        made = bridge()
        made.config.moe_enable_routing_replay = True
        made.get_model()

    chunks = bridge().get_model(folder)
    other_states = ParallelStates(tp_size=parallel_state.get_tensor_model_parallel_world_size() + 1)
    calls: dict[str, Callable[[], Any]] = {
        "fsdp": lambda: bridge().get_model(use_torch_fsdp2=True),
        "encoder and decoder": lambda: bridge().get_model(model_type="encoder_and_decoder"),
        "optimizer_config": lambda: bridge().get_model(optimizer_config={"overlap_grad_reduce": True}),
        "unknown keyword": lambda: bridge().get_model(use_magic=False),
        "defaults": lambda: bridge().get_model(
            model_type=ModelType.encoder_or_decoder,
            use_torch_fsdp2=False,
            use_custom_fsdp=False,
            use_precision_aware_optimizer=True,
            overlap_param_gather_with_optimizer_step=False,
        ),
        "bf16 of an fp32 bridge": lambda: bridge().get_model(bf16=True),
        "unknown ddp_config": lambda: bridge().get_model(wrap_with_ddp=True, ddp_config={"magic": 1}),
        "fsdp in ddp_config": lambda: bridge().get_model(wrap_with_ddp=True, ddp_config={"use_megatron_fsdp": True}),
        "unknown extra arg": lambda: bridge(magic=1),
        "unknown backend": lambda: bridge(attention_backend="magic"),
        "flash": lambda: bridge(attention_backend="flash").get_model(),
        "another model": lambda: bridge(hidden_size=32).get_model(),
        "another layout": lambda: bridge(context_parallel_size=2).get_model(),
        "routing replay": routing_replay,
        "padded vocabulary": lambda: AutoBridge.from_config(hf_config, make_vocab_size_divisible_by=48),
        "divided vocabulary": lambda: AutoBridge.from_config(hf_config, make_vocab_size_divisible_by=64),
        "other states": lambda: AutoBridge.from_config(hf_config, parallel_states=other_states),
        "own states": lambda: AutoBridge.from_config(hf_config, parallel_states=ParallelStates.get_parallel_state()),
        "private method": lambda: bridge()._weight_to_hf_format,
        "weights there": lambda: bridge().save_weights(chunks, folder),
        "like its config": lambda: AutoBridge.from_config(hf_config, **fp32).save_weights(chunks, folder / "new"),
        "like nothing": lambda: AutoBridge.from_config(unnamed, **fp32).save_weights(chunks, folder / "newer"),
        "vlm_step": lambda: check_model(chunks[0]),
        "config": lambda: AutoBridge.from_config(AutoConfig.from_pretrained(folder, image_token_id=9), **fp32),
    }
    return {name: error(call) for name, call in calls.items()}
