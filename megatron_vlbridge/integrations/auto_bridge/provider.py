"""What builds a model for a framework: settings from outside, hooks, and the chunks of this rank."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.integrations.auto_bridge.unsupported import not_offered, reject_keywords
from megatron_vlbridge.integrations.chunks import Chunks, Hook, apply_hook, build_chunks
from megatron_vlbridge.model.mtp import embedding_ranks
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.guards import check_layout

_FIELDS = frozenset(field.name for field in dataclasses.fields(TransformerConfig))
_DTYPES = ("params_dtype", "pipeline_dtype", "autocast_dtype")
_OWN = ("share_embeddings_and_output_weights", "parallel_output", "_pg_collection")
_DISPATCHER = "moe_token_dispatcher_type"


class ModelProvider:
    """Builds a model, with the names of Megatron-Bridge's providers.

    The fields of Megatron's `TransformerConfig` are attributes, to be read and set, until and after `finalize`. Others
    are `share_embeddings_and_output_weights` and `parallel_output` of the model. Any other name is rejected.

    Fields that Megatron-Bridge's users leave out have its defaults: the loss is averaged by the caller, tokens go to
    experts by all-to-all, and the dtype is the checkpoint's.

    Example: `provider.tensor_model_parallel_size = 2`, `provider.finalize()`,
    `provider.provide_distributed_model(ddp_config=DistributedDataParallelConfig())`.
    """

    share_embeddings_and_output_weights: bool
    parallel_output: bool
    _pg_collection: ProcessGroupCollection | None

    def __init__(self, hf_config: Config, dtype: torch.dtype, load: Hook | None = None) -> None:
        own = {"_hf_config": hf_config, "_hooks": [] if load is None else [load], "_post_hooks": [], "_config": None}
        own |= {"share_embeddings_and_output_weights": hf_config.tie_word_embeddings, "parallel_output": True}
        own |= {"_plain": language_config(hf_config), "_settings": {}, "_pg_collection": None}
        self.__dict__.update(own)
        self._set_dtype(dtype)
        self.calculate_per_token_loss = False
        self.moe_token_dispatcher_type = "alltoall"

    def __getattr__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise not_offered("the provider", name)
        if self.__dict__["_config"] is not None:
            return getattr(self._config, name)
        return self._settings.get(name, getattr(self._plain, name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIELDS:
            self._settings[name] = value
        elif name in _OWN:
            self.__dict__[name] = value
        else:
            raise not_offered("the provider", name)
        if name != "_pg_collection":  # frameworks set it before each chunk, which share the config
            self.__dict__["_config"] = None

    def apply_overrides_and_finalize(
        self, dtype: torch.dtype | None = None, overrides: Mapping[str, object] | None = None
    ) -> Self:
        """Set the dtype of the parameters and these attributes, and finalize."""
        if dtype is not None:
            self._set_dtype(dtype)
        for name, value in (overrides or {}).items():
            setattr(self, name, value)
        self.finalize()
        return self

    def finalize(self) -> None:
        """Make the config of the model from the attributes.

        Raises VLBridgeError: an attribute that the checkpoint decides has another value, or a layout or setting is not
        verified (`training.guards.check_layout`).
        """
        settings = dict(self._settings)
        if not self._plain.num_moe_experts:
            # Without experts they have no effect; Megatron asks for the dispatcher all the same.
            settings = {name: x for name, x in settings.items() if not name.startswith("moe_") or name == _DISPATCHER}
        if settings.get("virtual_pipeline_model_parallel_size"):
            settings = {"overlap_p2p_comm": True, "batch_p2p_comm": False} | settings
        backend = settings.get("attention_backend")
        if isinstance(backend, str):
            settings["attention_backend"] = _attention_backend(backend)
        hf_config = self._built_config()
        config = language_config(hf_config, **settings)
        check_layout(config, hf_config, own_loss=True)
        self.__dict__["_config"] = config

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> Qwen3VLModel:
        """One stage of the model, without hooks; by default that of this pipeline rank."""
        config = self.finalized()
        groups = self._pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        return Qwen3VLModel(
            config,
            self._built_config(),
            pre_process=is_pp_first_stage(groups.pp) if pre_process is None else pre_process,
            post_process=is_pp_last_stage(groups.pp) if post_process is None else post_process,
            vp_stage=vp_stage,
            parallel_output=self.parallel_output,
            pg_collection=groups,
        )

    def register_pre_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Call `hook` with the chunks before they are wrapped, after the hooks that are registered (or before)."""
        self._hooks.insert(0 if prepend else len(self._hooks), hook)

    def register_post_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Call `hook` with the chunks after they are wrapped."""
        self._post_hooks.insert(0 if prepend else len(self._post_hooks), hook)

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | None = None,
        model_type: object = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = True,
        use_cpu_initialization: bool | None = None,
        init_model_with_meta_device: bool | None = None,
        pre_wrap_hook: Hook | Sequence[Hook] | None = None,
        post_wrap_hook: Hook | None = None,
        mixed_precision_wrapper: Callable[..., torch.nn.Module] | None = Float16Module,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> Chunks:
        """This rank's chunks, changed by the hooks and wrapped (`integrations.chunks.build_chunks`).

        `fp16` or `bf16` set the dtype of the parameters if true. Hooks that are given replace those that were
        registered, also the one that loads the weights. `data_parallel_random_init` broadcasts the parameters over the
        data-parallel ranks. All ranks must call it.

        Raises VLBridgeError: as `finalize`, the process groups have other sizes, and for keywords that are not offered.
        """
        reject_keywords(
            "provide_distributed_model",
            overlap_param_gather_with_optimizer_step=overlap_param_gather_with_optimizer_step,
            use_megatron_fsdp=use_megatron_fsdp,
            use_torch_fsdp2=use_torch_fsdp2,
            init_model_with_meta_device=init_model_with_meta_device,
            mixed_precision_wrapper=None if mixed_precision_wrapper is Float16Module else repr(mixed_precision_wrapper),
            pg_collection=pg_collection,
        )
        if wrap_with_ddp and ddp_config is None:
            raise VLBridgeError(
                "provide_distributed_model: expected a ddp_config, found none. Give one, or wrap_with_ddp=False."
            )
        if fp16 and bf16:
            raise VLBridgeError("provide_distributed_model: expected one of fp16 and bf16, found both. Leave one out.")
        if fp16 or bf16:
            self._set_dtype(torch.float16 if fp16 else torch.bfloat16)
        if use_cpu_initialization is not None:
            self.use_cpu_initialization = use_cpu_initialization
        hooks = self._hooks if pre_wrap_hook is None else pre_wrap_hook
        chunks = build_chunks(
            self.finalized(),
            self.provide,
            hooks=[hooks] if callable(hooks) else hooks,
            ddp_config=ddp_config if wrap_with_ddp else None,
        )
        if wrap_with_ddp and data_parallel_random_init:
            for chunk in chunks:
                chunk.broadcast_params()  # type: ignore[operator]
        for hook in self._post_hooks if post_wrap_hook is None else [post_wrap_hook]:
            chunks = apply_hook(hook, chunks)
        return chunks

    def initialize_model_parallel(
        self, seed: int | None = None, seed_kwargs: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        """Make Megatron's process groups in the sizes of the attributes, and seed its random states."""
        if not torch.distributed.is_initialized():
            raise VLBridgeError(
                "initialize_model_parallel: expected the ranks to be connected, found no process group. Call "
                "torch.distributed.init_process_group first."
            )
        config, tied = self.finalized(), self.share_embeddings_and_output_weights
        if config.mtp_num_layers:
            others = {"get_embedding_ranks": lambda ranks: embedding_ranks(ranks, config, tied)} | others
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            expert_tensor_parallel_size=config.expert_tensor_parallel_size,
            **others,
        )
        if seed is not None:
            model_parallel_cuda_manual_seed(seed, **(seed_kwargs or {}))

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.fp16, self.bf16 = dtype == torch.float16, dtype == torch.bfloat16
        for name in _DTYPES:
            setattr(self, name, dtype)

    def finalized(self) -> TransformerConfig:
        """The config of the model, made if an attribute has changed."""
        if self.__dict__["_config"] is None:
            self.finalize()
        config: TransformerConfig = self._config
        return config

    def _built_config(self) -> Config:
        """The checkpoint's config with the ends of the model tied as asked: a critic has a head of its own."""
        return dataclasses.replace(self._hf_config, tie_word_embeddings=self.share_embeddings_and_output_weights)


def _attention_backend(name: str) -> AttnBackend:
    if name not in AttnBackend.__members__:
        raise VLBridgeError(
            f"attention_backend: expected one of {', '.join(AttnBackend.__members__)}, found {name!r}. Correct it."
        )
    return AttnBackend[name]
