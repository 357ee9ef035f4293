"""What runs inside the workers: verl's own code on models that it builds through mbridge's `AutoBridge`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from mbridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model
from transformers import AutoConfig
from verl.models.mcore.model_forward import gptmodel_forward_model_engine, model_forward_gen
from verl.utils.megatron.tensor_parallel import vocab_parallel_log_probs_from_logits
from verl.utils.megatron_utils import (
    McoreModuleWrapperConfig,
    make_megatron_module,
    mapping_string_to_attn_backend,
    unwrap_model,
)

import megatron_vlbridge.integrations.mbridge  # noqa: F401  registers
from tests import reference
from tests.functional import ranks
from tests.functional.call_ranks import FILLER, media
from tests.functional.pool import Layout

Conversations = Sequence[reference.Conversation]
MICRO_BATCHES = 2  # of two conversations


def build(
    folder: Path,
    *,
    value_model: bool = False,
    freeze_router: bool = False,
    dtype: torch.dtype = torch.float32,
    **extra_args: Any,
) -> tuple[Any, list[Any]]:
    """The bridge, and this rank's chunks with the folder's weights: as verl 0.9.1 does with `vanilla_mbridge`.

    Source: `MegatronEngine._build_tf_config` and `_build_megatron_module`, `workers/engine/megatron`.
    """
    hf_config = AutoConfig.from_pretrained(folder)
    if value_model:
        hf_config.tie_word_embeddings = False
    bridge = AutoBridge.from_config(hf_config, dtype=dtype)
    bridge.set_extra_args(**mapping_string_to_attn_backend({"attention_backend": "auto", **extra_args}))
    bridge.config.fp16, bridge.config.bf16 = dtype == torch.float16, dtype == torch.bfloat16
    chunks, _ = make_megatron_module(
        McoreModuleWrapperConfig(is_value_model=value_model, use_distributed_optimizer=False),
        bridge.config,
        hf_config,
        bridge,
        override_model_config={"moe_config": {"freeze_moe_router": freeze_router}},
    )
    bridge.load_weights(chunks, folder)
    return bridge, chunks


def log_probs(logits: torch.Tensor, label: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
    """verl's processor of logits, which divides them by the temperature in place."""
    return {"log_probs": vocab_parallel_log_probs_from_logits(logits.div_(1.0), label)}


def engine(data_format: str, model: Any, conversations: Conversations, value_model: bool = False) -> Any:
    """verl's engine: nested rows in, nested rows out."""
    ids = nested([c.tokens for c in conversations])
    arguments = {"label": ids.clone(), "loss_mask": nested([torch.ones_like(c.tokens) for c in conversations])}
    return gptmodel_forward_model_engine(
        model,
        ids,
        media(conversations),
        None if value_model else log_probs,
        None if value_model else arguments,
        value_model=value_model,
        vision_model=True,
        pad_token_id=FILLER,
        data_format=data_format,
    )


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of different lengths as verl keeps them."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def legacy(data_format: str, model: Any, conversations: Conversations, value_model: bool = False) -> Any:
    """verl's older workers: padded rows in, here padded on the left and on the right, padded rows out."""
    batch = reference.padded_batch(conversations)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    output = model_forward_gen(vision_model=True)(
        model,
        ids,
        mask,
        (mask.cumsum(1) - 1).clamp(min=0),
        media(conversations),
        None if value_model else log_probs,
        None if value_model else {"label": ids.roll(-1, 1)},
        value_model=value_model,
        data_format=data_format,
    )
    if not get_attr_wrapped_model(model, "post_process"):
        return output
    if value_model:
        return [row[kept] for row, kept in zip(output, mask, strict=True)]
    return {"log_probs": nested([row[kept] for row, kept in zip(output["log_probs"], mask, strict=True)])}


FORMS: dict[str, Callable[..., Any]] = {
    "engine-thd": partial(engine, "thd"),
    "engine-bshd": partial(engine, "bshd"),
    "legacy-thd": partial(legacy, "thd"),
    "legacy-bshd": partial(legacy, "bshd"),
}


def run(layout: Layout, folder: Path, form: str, conversations: Conversations, **options: Any) -> dict[str, Any]:
    """A training step of verl's, averaged over the labels: token losses, which tokens they are of, gradient shards.

    A conversation's last token has no label. Under context parallelism verl gives all tokens on all ranks.
    """
    _, chunks = build(folder, **options)
    chunks[0].config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    labels, found = torch.cat([c.labels for c in conversations]), []

    def step(batches: Iterator[tuple[Conversations, torch.Tensor]], model: torch.nn.Module) -> Any:
        batch, owner = next(batches)
        output = FORMS[form](model, batch)
        if not get_attr_wrapped_model(model, "post_process"):
            return output, None
        losses = -torch.cat(list(output["log_probs"].unbind())) * (labels[owner] != -100)
        found.append((losses.detach().clone(), owner))
        # verl scales by the number of micro-batches, by which Megatron divides.
        return losses, lambda x: (x.sum() / (labels != -100).sum() * MICRO_BATCHES, {"loss": x.sum().detach()})

    schedule(step, chunks, conversations, forward_only=False)
    gradients = [shard for chunk in unwrap_model(chunks) for shard in ranks.gradient_shards(chunk)]
    return {"found": found, "gradients": gradients, "tp_rank": parallel_state.get_tensor_model_parallel_rank()}


def schedule(step: Callable[..., Any], chunks: list[Any], conversations: Conversations, forward_only: bool) -> None:
    """Megatron's schedule as verl runs it for rows of varying length; micro-batches come with their tokens' places."""
    tokens = iter(torch.arange(sum(len(c.tokens) for c in conversations)).split([len(c.tokens) for c in conversations]))
    batches = [(part, torch.cat([next(tokens) for _ in part])) for part in batched(conversations, 2)]
    assert len(batches) == MICRO_BATCHES
    iterators = [iter(batches) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=MICRO_BATCHES,
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
