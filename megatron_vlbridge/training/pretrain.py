"""`megatron.training.pretrain`: the model that Megatron builds, and the call. For Megatron-Core 0.19."""

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import megatron.core.datasets.utils
import megatron.training.training
import torch
from megatron.core.enums import ModelType
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import get_megatron_optimizer_config

from megatron_vlbridge.backends import cpu_adam, cpu_runtime, cpu_saving
from megatron_vlbridge.checkpoint.live import load_hf_weights, load_torch_dist_weights
from megatron_vlbridge.checkpoint.live.collectives import gather
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import read_config
from megatron_vlbridge.model.mtp import embedding_ranks
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training import console
from megatron_vlbridge.training.datasets import EagerDatasetProvider
from megatron_vlbridge.training.guards import check_layout, check_model
from megatron_vlbridge.training.launch.arguments import parse_arguments
from megatron_vlbridge.training.launch.lora import apply_lora_arguments, lora_note
from megatron_vlbridge.training.launch.parts import apply_part_arguments
from megatron_vlbridge.training.launch.start import loading_errors, loads_checkpoint
from megatron_vlbridge.training.launch.stop import end_data_loaders
from megatron_vlbridge.training.learning_rates import lr_overrides
from megatron_vlbridge.training.manifest import note_in_checkpoints, unverified_note
from megatron_vlbridge.training.media_guard.guard import stage_of
from megatron_vlbridge.training.metrics.csv_file import CsvFile
from megatron_vlbridge.training.metrics.data_counts import DataCounts
from megatron_vlbridge.training.metrics.meter import Meter
from megatron_vlbridge.training.step import vlm_step

__all__ = ["model_provider", "parse_arguments", "run"]

# This rank's virtual stages, while Megatron has them built one by one.
_chunks: list[Qwen3VLModel] = []


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> Qwen3VLModel:
    """Megatron's `model_provider`: this rank's stage of the model that `--hf-folder` describes.

    Its weights come from that folder with `--hf-weights`, unless `--load` holds a checkpoint, which is loaded later.
    With `--lora-rank` it has adapters, which are what `--load` holds.
    """
    args = get_args()
    hf_config = read_config(args.hf_folder)
    transformer_config = language_config(hf_config, config or core_transformer_config_from_args(args))
    check_layout(transformer_config, hf_config, allow=args.allow_unverified)
    model = Qwen3VLModel(
        transformer_config,
        hf_config,
        vocab_size=args.padded_vocab_size,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        balance_vision=not args.no_vision_balance,
        seq_length=args.seq_length,
        pg_collection=pg_collection,
    )
    model.layout_checked = True
    model.check_position_ids = args.check_position_ids
    apply_lora_arguments(args, model)
    apply_part_arguments(args, model)
    if args.lora_base or (args.hf_weights and (args.lora_rank or not loads_checkpoint(args))):
        _load_when_complete(model, vp_stage, args)
    return model


def _load_when_complete(model: Qwen3VLModel, vp_stage: int | None, args: argparse.Namespace) -> None:
    """Fill this rank's chunks when Megatron has built the last: only together they must hold every weight.

    Building a chunk is collective where the embeddings are tied, so no rank may load between two of them.
    """
    if not vp_stage:
        _chunks.clear()
    _chunks.append(model)
    if len(_chunks) == (args.virtual_pipeline_model_parallel_size or 1):
        if args.lora_base:
            load_torch_dist_weights(_chunks, args.lora_base)
        else:
            load_hf_weights(_chunks, args.hf_folder, random_mtp=args.random_mtp)
        _chunks.clear()


def run(
    args: argparse.Namespace,
    dataset_provider: Callable[..., Any],
    model_provider: Callable[..., torch.nn.Module] = model_provider,
) -> None:
    """Megatron's `pretrain` with :func:`vlm_step`, on a GPU or on the CPU; datasets are built before the model.

    `dataset_provider(train_valid_test_num_samples, vp_stage=None)` gives datasets of packs, as for any Megatron run.
    `model_provider` is called as Megatron's; it gives a :class:`Qwen3VLModel`, or one in modules that wrap it.

    Raises VLBridgeError: on all ranks, where the dataset provider fails on one, or a layout is not verified; where no
    launcher such as torchrun has started the script.
    Example: `run(parse_arguments(), my_dataset_provider)`.
    """
    if not torch.distributed.is_initialized() and "MASTER_ADDR" not in os.environ:
        raise VLBridgeError(
            f"the ranks cannot find each other (MASTER_ADDR is not set): start the script with torchrun, as in "
            f"torchrun --nproc_per_node 1 {sys.argv[0]} ..."
        )
    _mend_megatron()
    datasets = EagerDatasetProvider(dataset_provider)
    chunks: list[torch.nn.Module] = []
    megatron.training.training.get_megatron_optimizer_config = functools.partial(_optimizer_config, chunks)
    config = read_config(args.hf_folder)
    meter = Meter(
        config,
        CsvFile(args.metrics_csv) if args.metrics_csv else None,
        check_losses=args.check_for_nan_in_loss_and_grad,
        router_loss=bool(args.moe_aux_loss_coeff or args.moe_z_loss_coeff),
        first_item=lambda: args.consumed_train_samples if args.dataloader_type == "single" else None,
    )
    megatron.training.training.print_rank_last = meter.print_rank_last

    def model_after_datasets(*positional: Any, **named: Any) -> torch.nn.Module:
        datasets.build()
        model = model_provider(*positional, **named)
        stage = stage_of(model)
        if args.lora_rank and stage.lora is None:
            raise VLBridgeError(
                "--lora-rank: expected the model of megatron_vlbridge's model_provider, found one without adapters. "
                "Call that model_provider in yours; or call add_lora in it, and leave out --lora-rank"
            )
        check_model(stage, allow=args.allow_unverified)
        apply_part_arguments(args, stage)
        stage.check_position_ids |= args.check_position_ids
        # The one that Megatron calls at the end of each step, where there is one.
        get_model_config(model).finalize_model_grads_func = meter.finalize
        chunks.append(model)
        return model

    data_counts = DataCounts(args, lambda: datasets.training, lambda: meter.replaced)
    note_in_checkpoints(args, [unverified_note(args), lora_note(args), data_counts.save])
    console.begin(args, config)
    with end_data_loaders(), loading_errors():
        megatron.training.training.pretrain(
            pretrain_cfg_container_from_args(args, None),
            datasets,
            ModelType.encoder_or_decoder,
            functools.partial(vlm_step, meter=meter),
            model_after_datasets,
            get_embedding_ranks=_embedding_ranks,
        )
    for counts in data_counts.counts():
        console.note(f"data     {counts}")
    chunks.clear()


def _mend_megatron() -> None:
    """What Megatron-Core 0.19 as a wheel lacks, and what it lacks on the CPU."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        # The wheel ships the built helpers without the Makefile that Megatron would run.
        megatron.core.datasets.utils.compile_helpers = _nothing
    # It copies into views of fp32 weights, which autograd rejects (Megatron-Core 0.19).
    DistributedOptimizer.load_parameter_state_from_dp_reshardable = torch.no_grad()(
        DistributedOptimizer.load_parameter_state_from_dp_reshardable
    )
    if cpu_runtime.is_enabled():
        cpu_adam.install()
        cpu_saving.install()
        megatron.training.training.initialize_megatron = functools.partial(initialize_megatron, allow_no_cuda=True)


def _embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Which ranks of a pipeline hold the word embedding; Megatron asks when it makes its process groups."""
    args = get_args()
    tied = not args.untie_embeddings_and_output_weights
    return embedding_ranks(pp_ranks, core_transformer_config_from_args(args), tied)


def _optimizer_config(chunks: list[torch.nn.Module], args: argparse.Namespace) -> tuple[Any, dict[Any, Any]]:
    """Megatron's `get_megatron_optimizer_config`, with the learning rates of the parts of the model.

    Megatron asks before it builds the `chunks` too, and would train without any parameter silently.
    """
    config, overrides = get_megatron_optimizer_config(args)
    if chunks and not any(gather(any(p.requires_grad for chunk in chunks for p in chunk.parameters()))):
        raise VLBridgeError("the model provider froze every parameter: none is left to train")
    return config, overrides | lr_overrides(config, chunks)


def _nothing() -> None: ...
