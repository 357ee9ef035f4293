"""Megatron-Bridge's `AutoBridge` for the models of this project. Its names are those of version 0.6.2."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.dtypes import as_dtype
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.checkpoint.live import export_hf_weights, load_hf_weights
from megatron_vlbridge.checkpoint.live.adapters import export_adapter_weights, save_adapter
from megatron_vlbridge.checkpoint.live.collectives import gather, raise_on_all_ranks
from megatron_vlbridge.checkpoint.live.shards import Model, has_value_head, modules_of
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import read_config
from megatron_vlbridge.integrations.auto_bridge.merge import merged_chunks
from megatron_vlbridge.integrations.auto_bridge.pretrained import Pretrained
from megatron_vlbridge.integrations.auto_bridge.provider import ModelProvider
from megatron_vlbridge.integrations.auto_bridge.tasks import ConversionTask, conversion_tasks, names_of
from megatron_vlbridge.integrations.auto_bridge.unsupported import check_same_adapter, not_offered, reject_keywords
from megatron_vlbridge.integrations.hf_config import read_hf_config
from megatron_vlbridge.integrations.save_into import save_into

_PREFIX = "base_model.model."
_HEAD = "output_layer.weight"


class HFWeightTuple(NamedTuple):
    """A tensor of an export and its name."""

    param_name: str
    weight: torch.Tensor


class AutoBridge:
    """Between a Hugging Face checkpoint and a `Qwen3VLModel` on Megatron.

    `model` in its methods is what `provide_distributed_model` gives; all ranks must call them, with the same arguments.
    Options that do not change the result are accepted and ignored: progress bars, and how the ranks share the writing
    (all of them do). Names of Megatron-Bridge that are missing here raise an AttributeError that says what to use.

    Example: `AutoBridge.from_hf_pretrained(folder).to_megatron_provider().provide_distributed_model(ddp_config)`.
    """

    def __init__(self, hf_pretrained: Any, hf_config: Config, dtype: torch.dtype) -> None:
        self.hf_pretrained = hf_pretrained
        self._hf_config, self._dtype = hf_config, dtype

    def __getattr__(self, name: str) -> Any:
        raise not_offered("AutoBridge", name)

    @classmethod
    def from_hf_pretrained(
        cls,
        path: str | Path,
        trust_remote_code: bool | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        **others: object,
    ) -> Self:
        """The bridge of a folder or Hub id. `dtype` is that of models (default: the checkpoint's).

        No code of the checkpoint is run, whether it is trusted or not.
        """
        reject_keywords("from_hf_pretrained", **others)
        config = read_config(find_folder(path, weights=False))
        return cls(Pretrained(path), config, _dtype(dtype or torch_dtype or config.dtype))

    @classmethod
    def from_hf_config(cls, config: Any) -> Self:
        """The bridge of a config of transformers, without weights."""
        read = read_hf_config(config)
        return cls(config, read, _dtype(read.dtype))

    @property
    def transformer_config(self) -> TransformerConfig:
        """The language model's config on one process."""
        return self.to_megatron_provider(load_weights=False).finalized()

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None) -> ModelProvider:
        """What builds the model; with `load_weights` a hook that fills it from `hf_path` (default: the checkpoint)."""
        if not load_weights:
            return ModelProvider(self._hf_config, self._dtype)
        source = self._folder(hf_path)
        return ModelProvider(self._hf_config, self._dtype, lambda chunks: self.load_hf_weights(chunks, source))

    def load_hf_weights(
        self, model: Any, hf_path: str | Path | None = None, allowed_mismatched_params: Sequence[str] | None = None
    ) -> Any:
        """Fill a model from `hf_path` (default: the checkpoint), and give it back; see `load_hf_weights`.

        With `allowed_mismatched_params=["output_layer.weight"]` the head of a critic keeps its values.
        """
        allowed = list(allowed_mismatched_params or ())
        if allowed not in ([], [_HEAD]):
            raise VLBridgeError(
                f"load_hf_weights: allowed_mismatched_params: expected {[_HEAD]} or none, found {allowed}. Leave it "
                "out: every other parameter must have its weight in the folder."
            )
        value_head = bool(allowed) and any(gather(any(map(has_value_head, modules_of(model)))))
        load_hf_weights(model, self._folder(hf_path), value_head=value_head)
        return model

    def export_hf_weights(
        self,
        model: Model,
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: Iterable[ConversionTask | None] | None = None,
        merge_adapter_weights: bool = True,
        weight_dtype: torch.dtype | None = None,
    ) -> Iterator[HFWeightTuple]:
        """Whole tensors with their names on the Hub, in the same order on all ranks; see `export_hf_weights`.

        With `conversion_tasks` those of the tasks. Adapters of `add_lora` are added to the weights, in fp32, unless
        `merge_adapter_weights` is false. `cpu` moves the tensors there.
        """
        with raise_on_all_ranks():
            names = None if conversion_tasks is None else names_of(conversion_tasks)
        source = _merged(model, merge_adapter_weights)
        return _tuples(export_hf_weights(source, dtype=weight_dtype, names=names), cpu)

    def get_conversion_tasks(self, megatron_model: Model, hf_path: str | Path | None = None) -> list[ConversionTask]:
        """The parts of an export: one task for each group of tensors that belong together."""
        reject_keywords("get_conversion_tasks", hf_path=hf_path)
        return conversion_tasks(megatron_model)

    def export_adapter_weights(
        self,
        model: Model,
        cpu: bool = True,
        show_progress: bool = True,
        exclude_adapter_base_prefixes: Sequence[str] | None = None,
    ) -> Iterator[HFWeightTuple]:
        """The adapters of `add_lora` with `peft`'s names, without `base_model.model.`; see `export_adapter_weights`."""
        reject_keywords("export_adapter_weights", exclude_adapter_base_prefixes=exclude_adapter_base_prefixes)
        return _tuples(((name.removeprefix(_PREFIX), x) for name, x in export_adapter_weights(model)), cpu)

    def save_hf_pretrained(
        self,
        model: Model,
        path: str | Path,
        show_progress: bool = True,
        source_path: str | Path | None = None,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """Write a checkpoint like `source_path` (default: the bridge's), with its other files; see `save_into`.

        It is complete or not written, `strict` or not.
        """
        like, options = self._folder(source_path), {"dtype": weight_dtype}
        save_into(_merged(model, merge_adapter_weights), path, like, options=options)

    def save_hf_weights(
        self,
        model: Model,
        path: str | Path,
        show_progress: bool = True,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """As `save_hf_pretrained`, the weights and their index alone."""
        source, options = _merged(model, merge_adapter_weights), {"dtype": weight_dtype}
        save_into(source, path, self._folder(None), weights_only=True, options=options)

    def save_hf_adapter(
        self,
        model: Model,
        path: str | Path,
        peft_config: Any = None,
        base_model_name_or_path: str | None = None,
        show_progress: bool = True,
        exclude_adapter_base_prefixes: Sequence[str] | None = None,
    ) -> None:
        """Write the adapters of `add_lora` as a folder of `peft`; see `save_adapter`.

        `dim` and `alpha` of a `peft_config` must be those of the adapters.
        """
        reject_keywords("save_hf_adapter", exclude_adapter_base_prefixes=exclude_adapter_base_prefixes)
        check_same_adapter(modules_of(model)[0].lora, peft_config)
        save_adapter(model, path, base_model_name_or_path or str(self._folder(None)))

    @classmethod
    def import_ckpt(cls, hf_model_id: str | Path, megatron_path: str | Path, **others: object) -> None:
        """Write a folder or Hub id as a `torch_dist` checkpoint, on one process; see `import_checkpoint`."""
        others.pop("trust_remote_code", None)
        dtype: Any = others.pop("dtype", None) or others.pop("torch_dtype", None)
        reject_keywords("import_ckpt", **others)
        import_checkpoint(hf_model_id, megatron_path, dtype=dtype)

    def export_ckpt(
        self,
        megatron_path: str | Path,
        hf_path: str | Path,
        show_progress: bool = True,
        strict: bool = True,
        source_path: str | Path | None = None,
    ) -> None:
        """Write a `torch_dist` checkpoint as a Hugging Face folder, on one process; see `export_checkpoint`."""
        export_checkpoint(megatron_path, hf_path, like=self._folder(source_path))

    def _folder(self, path: str | Path | None) -> str | Path:
        """The path that was given, or the checkpoint's."""
        if path is not None:
            return path
        if isinstance(self.hf_pretrained, Pretrained):
            return self.hf_pretrained.model_name_or_path
        raise VLBridgeError(
            "a bridge of from_hf_config has no weights: expected a path to a Hugging Face folder, found none. Give it "
            "(hf_path, source_path, or to_megatron_provider(load_weights=False)), or use from_hf_pretrained."
        )


def _dtype(name: str | torch.dtype) -> torch.dtype:
    found = as_dtype(name)
    assert found is not None
    return found


def _merged(model: Model, merge: bool) -> Any:
    return merged_chunks(model) if merge else model


def _tuples(weights: Iterable[tuple[str, torch.Tensor]], cpu: bool) -> Iterator[HFWeightTuple]:
    for name, tensor in weights:
        yield HFWeightTuple(name, tensor.cpu() if cpu else tensor)
