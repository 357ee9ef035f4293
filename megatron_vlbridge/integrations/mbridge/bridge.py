"""The bridge that mbridge's `AutoBridge` gives for a model of this project."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from mbridge.core.bridge import Bridge
from mbridge.core.parallel_states import ParallelStates
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.router import Router

from megatron_vlbridge.checkpoint.live import export_hf_weights, load_hf_weights
from megatron_vlbridge.checkpoint.live.collectives import gather
from megatron_vlbridge.checkpoint.live.shards import has_value_head, modules_of
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.integrations.auto_bridge.merge import merged_chunks
from megatron_vlbridge.integrations.chunks import Chunks, build_chunks
from megatron_vlbridge.integrations.hf_config import read_hf_config
from megatron_vlbridge.integrations.mbridge.config import check_names, transformer_config
from megatron_vlbridge.integrations.mbridge.unsupported import check_keywords, missing_attribute
from megatron_vlbridge.integrations.save_into import save_into
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.guards import check_layout


class VLBridge:
    """A model of this project with the interface of mbridge's `Bridge`.

    Args:
        hf_config: transformers' config of the checkpoint.
        dtype: of the parameters.
        parallel_states: Megatron's, which is the default.
        make_vocab_size_divisible_by: must divide the vocabulary.

    `config` is the language model's `TransformerConfig`, for the parallel state that Megatron has when the bridge is
    made. What else mbridge's interface has is rejected by name.

    Raises VLBridgeError for a config that is not supported.
    Example: `AutoBridge.from_pretrained(folder, dtype=torch.bfloat16).get_model(folder, wrap_with_ddp=True)`.
    """

    def __init__(
        self,
        hf_config: Any,
        dtype: torch.dtype = torch.bfloat16,
        parallel_states: ParallelStates | None = None,
        make_vocab_size_divisible_by: int | None = None,
    ) -> None:
        self.hf_config, self.dtype = hf_config, dtype
        self.checkpoint = read_hf_config(hf_config)
        self.mpu = ParallelStates.get_parallel_state()
        if parallel_states not in (None, self.mpu):
            raise VLBridgeError(
                "parallel_states: expected Megatron's own, of which the model takes its process groups, found others. "
                "Leave it out."
            )
        vocab_size = self.checkpoint.text.vocab_size
        if make_vocab_size_divisible_by and vocab_size % make_vocab_size_divisible_by:
            raise VLBridgeError(
                f"make_vocab_size_divisible_by: expected a divisor of the vocabulary, {vocab_size}, found "
                f"{make_vocab_size_divisible_by}: the columns that pad it would count in the log-probs. Leave it out."
            )
        self.extra_args: dict[str, Any] = {}
        self.config = transformer_config(self.checkpoint, dtype, self.mpu, {})
        self._source: str | Path | None = None

    def __getattr__(self, name: str) -> Any:
        raise missing_attribute(name, dir(Bridge))

    def set_extra_args(self, **kwargs: Any) -> None:
        """Make `config` anew, with these fields of `TransformerConfig` and those of earlier calls over mbridge's.

        Raises VLBridgeError for names that it does not have. `get_model` checks the values.
        Example: `bridge.set_extra_args(recompute_granularity="selective", attention_backend="fused")`.
        """
        extra_args = self.extra_args | kwargs
        self.config = transformer_config(self.checkpoint, self.dtype, self.mpu, extra_args)
        self.extra_args = extra_args

    def get_model(
        self,
        weight_path: str | Path | None = None,
        *,
        wrap_with_ddp: bool = False,
        fp16: bool | None = None,
        bf16: bool | None = None,
        ddp_config: Mapping[str, Any] | None = None,
        data_parallel_random_init: bool = True,
        post_model_creation_callbacks: Sequence[Callable[..., None]] = (),
        **others: Any,
    ) -> Chunks:
        """This rank's chunks of the model, random or with the weights in `weight_path`; all ranks must call it.

        The callbacks get each chunk before it is wrapped, and `pre_process`, `post_process`, `config`, `hf_config`.
        `fp16` and `bf16` are those of `config`. With `wrap_with_ddp` gradients are reduced in fp32 for the distributed
        optimizer, where `ddp_config` (fields of Megatron's config) does not say otherwise; `data_parallel_random_init`
        broadcasts the parameters over the data-parallel ranks.

        Raises VLBridgeError for a layout that is not verified (`check_layout`), and for other arguments that would
        change the model.
        Example: `bridge.get_model(wrap_with_ddp=True, ddp_config={"overlap_grad_reduce": True})`.
        """
        check_keywords(others, Bridge.get_model)
        for name, asked in (("fp16", fp16), ("bf16", bf16)):
            expected = getattr(self.config, name)
            if asked not in (None, expected):
                raise VLBridgeError(
                    f"get_model: {name}: expected {expected}, as in bridge.config, found {asked}. Give the dtype to "
                    "AutoBridge.from_config."
                )
        check_layout(self.config, self.checkpoint, own_loss=True)
        chunks = build_chunks(
            self.config,
            partial(self._build_stage, post_model_creation_callbacks),
            ddp_config=_ddp_config(ddp_config or {}) if wrap_with_ddp else None,
        )
        if wrap_with_ddp and data_parallel_random_init:
            for chunk in chunks:
                cast(DistributedDataParallel, chunk).broadcast_params()
        if weight_path is not None:
            self.load_weights(chunks, weight_path)
        return chunks

    def _build_stage(self, callbacks: Sequence[Callable[..., None]], **stage: Any) -> Qwen3VLModel:
        model = Qwen3VLModel(self.config, self.checkpoint, **stage)
        with _router_biases(model):
            for callback in callbacks:
                callback(
                    model,
                    pre_process=model.pre_process,
                    post_process=model.post_process,
                    config=self.config,
                    hf_config=self.hf_config,
                )
        return model

    def load_weights(self, models: Chunks, weights_path: str | Path, memory_efficient: bool = False) -> None:
        """Fill the chunks of all ranks from a folder or Hub id; the head of a critic keeps its values.

        Each rank reads its own slices, with or without `memory_efficient`. For errors see `load_hf_weights`.
        """
        load_hf_weights(models, weights_path, value_head=_is_critic(models))
        self._source = weights_path

    def export_weights(self, models: Chunks) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name as on the Hub, whole and in the same order on all ranks; adapters are merged.

        For errors and memory see `export_hf_weights`; a critic's are rejected.
        """
        self._reject_value_head(models)
        return export_hf_weights(merged_chunks(models))

    def save_weights(self, models: Chunks, weights_path: str | Path, memory_efficient: bool = False) -> None:
        """Write a checkpoint like the folder that was loaded, by all ranks, with or without `memory_efficient`.

        If nothing was loaded, it is like the folder or Hub id that `hf_config` was read from. Where `weights_path` has
        a `config.json` already, as verl puts it there with the tokenizer, only weights and their index are added.

        Raises VLBridgeError, on all ranks, for a critic, for a folder with weights, and where `save_hf` does.
        """
        self._reject_value_head(models)
        like = self._source or getattr(self.hf_config, "name_or_path", None)
        if not like:
            raise VLBridgeError(
                f"{weights_path}: expected a checkpoint that it is to be like, found none. Load one before "
                "(load_weights), or read hf_config from one."
            )
        described = gather(Path(weights_path, "config.json").is_file())[0]
        save_into(merged_chunks(models), weights_path, like, weights_only=described)

    def _reject_value_head(self, models: Chunks) -> None:
        if _is_critic(models):
            raise VLBridgeError(
                "a critic: expected the head of a language model, found one that gives values, for which a Hugging "
                "Face checkpoint has no name. Save it with Megatron's dist_checkpointing."
            )


@contextmanager
def _router_biases(model: Qwen3VLModel) -> Iterator[None]:
    """Routers without a bias have one in this block: mbridge's `freeze_moe_router` fails where Megatron has None."""
    routers = [module for module in model.modules() if isinstance(module, Router) and module.bias is None]
    for router in routers:
        router.bias = torch.empty(0)
    try:
        yield
    finally:
        for router in routers:
            router.bias = None


def _is_critic(models: Chunks) -> bool:
    """Whether the last stage, on whatever rank, has a value head. Collective."""
    return any(gather(any(map(has_value_head, modules_of(models)))))


def _ddp_config(given: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """What is given over the defaults of mbridge."""
    fields = {field.name for field in dataclasses.fields(DistributedDataParallelConfig)}
    check_names("ddp_config", given, fields)
    for name in ("use_megatron_fsdp", "use_custom_fsdp"):
        if given.get(name):
            raise VLBridgeError(f"ddp_config: {name} is not supported. Use DDP with the distributed optimizer.")
    return DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, **given})
