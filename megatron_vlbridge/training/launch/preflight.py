"""Checks of sizes, before Megatron makes process groups or a model: arithmetic on the arguments and the checkpoint.

The rules are those that Megatron-Core 0.19 asserts in many places, some only after the weights are read.
"""

import argparse
from collections.abc import Iterator
from math import lcm
from pathlib import Path
from typing import cast

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_vlbridge import families
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.transformer_config import linear_attention_fault

_TP, _PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
_CP, _EP, _ETP = "--context-parallel-size", "--expert-model-parallel-size", "--expert-tensor-parallel-size"
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_LAYOUT = "--pipeline-model-parallel-layout"
_CHUNK_LAYERS, _CHUNKS = "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"

# Arguments that must be at least one where they are given.
_POSITIVE = (
    *(_TP, _PP, _CP, _EP, _ETP, _FIRST, _LAST, _CHUNK_LAYERS, _CHUNKS),
    *("--seq-length", "--global-batch-size", "--eval-global-batch-size", "--train-iters", "--train-samples"),
    *("--save-interval", "--eval-interval", "--seed", "--num-distributed-optimizer-instances"),
    *("--pack-multiple-of", "--max-patches-per-pack", "--pack-window", "--pack-neighbors"),
    *("--max-image-pixels", "--min-pixels", "--max-pixels", "--video-min-pixels", "--video-max-pixels"),
    *("--video-total-pixels", "--video-min-frames", "--video-max-frames"),
    "--microbatch-group-size-per-virtual-pipeline-stage",
)
_NAMES = {"--microbatch-group-size-per-virtual-pipeline-stage": "microbatch_group_size_per_vp_stage"}


def check_arguments(args: argparse.Namespace, config: Config) -> None:
    """Reject sizes that cannot run; `args` as they are parsed, before Megatron's `validate_args`.

    Raises VLBridgeError, naming each argument with its value, what it contradicts, and valid values.
    """
    _reject([*_missing(args), *_not_positive(args)])
    _reject(
        [
            *_files(args),
            *_world(args),
            *_tensor(args, config),
            *_experts(args, config),
            *_pipeline(args, config),
            *_sequence(args, config),
            *_batch(args),
            *_learning_rate(args),
        ]
    )


def _reject(faults: list[str]) -> None:
    if faults:
        raise VLBridgeError("\n".join(faults))


def _missing(args: argparse.Namespace) -> Iterator[str]:
    if args.seq_length is None:
        yield "--seq-length is missing: the number of tokens of a pack"
    if args.train_iters is None and args.train_samples is None:
        yield "--train-iters is missing: the number of optimizer steps"
    if args.lr is None and not args.skip_train:
        yield "--lr is missing: the largest learning rate"


def _not_positive(args: argparse.Namespace) -> Iterator[str]:
    for flag in _POSITIVE:
        value = getattr(args, _NAMES.get(flag, flag.removeprefix("--").replace("-", "_")))
        if value is not None and value < 1:
            yield f"{flag} is {value}, expected at least 1"


def _files(args: argparse.Namespace) -> Iterator[str]:
    for flag, name in (("--conversations", args.conversations), ("--valid-conversations", args.valid_conversations)):
        if name is not None and not Path(name).is_file():
            yield f"{flag} {name}: {'a folder, expected a file' if Path(name).is_dir() else 'no such file'}"


def _world(args: argparse.Namespace) -> Iterator[str]:
    """Process groups cut the ranks once for the dense layers, once for the experts."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    etp, ep = _etp(args), args.expert_model_parallel_size
    dense = f"{_TP} {tp} x {_PP} {pp} x {_CP} {cp} = {tp * pp * cp}"
    experts = f"{_ETP} {etp} x {_EP} {ep} x {_PP} {pp} = {etp * ep * pp}"
    for needed, product in ((tp * pp * cp, dense), (etp * ep * pp, experts)):
        if args.world_size % needed:
            yield (
                f"{args.world_size} processes are not a multiple of {product}; "
                "start a multiple of it (torchrun --nproc_per_node, --nnodes) or use smaller sizes"
            )
            return
    replicas, instances = args.world_size // (tp * pp), args.num_distributed_optimizer_instances
    if replicas % instances:
        yield (
            f"--num-distributed-optimizer-instances {instances} does not divide the {replicas} data- and "
            "context-parallel ranks"
        )


def _etp(args: argparse.Namespace) -> int:
    return int(args.expert_tensor_parallel_size or args.tensor_model_parallel_size)


def _tensor(args: argparse.Namespace, config: Config) -> Iterator[str]:
    size = args.tensor_model_parallel_size
    if faults := _indivisible(config, size):
        possible = [n for n in range(1, config.text.num_attention_heads + 1) if not _indivisible(config, n)]
        yield f"{_TP} {size} does not divide {', '.join(faults)}; this model takes {_words(possible)}"
    if fault := linear_attention_fault(config, size, args.context_parallel_size):
        yield fault


def _indivisible(config: Config, size: int) -> list[str]:
    """What tensor parallelism of this size does not divide into equal parts."""
    text, vision = config.text, config.vision
    widths = {
        "attention heads": text.num_attention_heads,
        "heads of the vision tower": vision.num_heads,
        "columns of the vision tower's MLP": vision.intermediate_size,
    }
    if not all(kind.experts for kind in text.layer_kinds):
        widths["columns of the MLP"] = text.intermediate_size
    faults = [f"the {width} {what}" for what, width in widths.items() if width % size]
    # Ranks share a key-value head where there are more ranks than heads.
    if text.num_key_value_heads % size and size % text.num_key_value_heads:
        faults.append(f"the {text.num_key_value_heads} key-value heads (nor is it a multiple of them)")
    return faults


def _experts(args: argparse.Namespace, config: Config) -> Iterator[str]:
    size, experts, width = args.expert_model_parallel_size, config.text.num_experts, config.text.moe_intermediate_size
    if size > 1 and "ep" not in families.find(config).dimensions:
        yield f"{_EP} is {size}, but {config.architecture} has no experts; leave it out"
    elif experts % size:
        yield f"{_EP} {size} does not divide the {experts} experts; use {_words(_divisors(experts))}"
    if width % _etp(args):
        yield (
            f"{_ETP} {_etp(args)} (by default the tensor-parallel size) does not divide the "
            f"{width} columns of an expert; use {_words(_divisors(width))}"
        )


def _pipeline(args: argparse.Namespace, config: Config) -> Iterator[str]:
    ways = {
        _CHUNK_LAYERS: args.num_layers_per_virtual_pipeline_stage,
        _CHUNKS: args.num_virtual_stages_per_pipeline_rank,
        _LAYOUT: args.pipeline_model_parallel_layout,
    }
    given = [flag for flag, value in ways.items() if value is not None]
    uneven = [flag for flag, value in _ends(args).items() if value is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)}: each splits the layers in its own way; use one of them"
    elif uneven and given in ([_LAYOUT], [_CHUNK_LAYERS]):
        yield f"{uneven[0]} contradicts {given[0]}; use one of them" + (
            f", or {_CHUNKS}" if given == [_CHUNK_LAYERS] else ""
        )
    elif args.pipeline_model_parallel_layout is not None:
        yield from _layout_string(args, config)
    else:
        yield from _stages(args, config)
    if _virtual_stages(args, config) > 1:
        yield from _interleaving(args)


def _ends(args: argparse.Namespace) -> dict[str, int | None]:
    return {_FIRST: args.decoder_first_pipeline_num_layers, _LAST: args.decoder_last_pipeline_num_layers}


def _layout_string(args: argparse.Namespace, config: Config) -> Iterator[str]:
    text, size = args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size
    where = f"{_LAYOUT} {text!r}"
    stages = _parsed(text)
    if not stages:
        yield (
            f"{where}: expected stages of E (embedding), t (decoder layer), m (multi-token prediction), L (loss), "
            "separated by |, with (...)*N for repetition, such as 'Et|(tt|)*3L'"
        )
        return
    layers = sum(stage.count(LayerType.decoder) for stage in stages)
    if len(stages) % size:
        yield f"{where} has {len(stages)} stages, expected a multiple of {_PP} {size}"
    elif layers != config.text.num_layers:
        yield f"{where} has {layers} decoder layers (t), the model has {config.text.num_layers}"
    else:
        try:
            layout = PipelineParallelLayerLayout(text, size)
            layout.validate_layer_layout(config.text.num_layers, config.text.num_mtp_layers or None)
        except (AssertionError, IndexError) as error:
            yield f"{where}: {error}; the model is E, then {layers} t, then {config.text.num_mtp_layers} m, then L"


def _parsed(layout: str) -> list[list[LayerType]]:
    """The stages of a layout string, none where it is malformed."""
    try:
        return cast(list[list[LayerType]], PipelineParallelLayerLayout.parse_str_to_list(layout))
    except AssertionError:
        return []


def _stages(args: argparse.Namespace, config: Config) -> Iterator[str]:
    """Layers in equal parts, except in the first and the last stage where these are given."""
    layers, size = config.text.num_layers, args.pipeline_model_parallel_size
    ends = {flag: value for flag, value in _ends(args).items() if value is not None}
    rest, stages = layers - sum(ends.values()), size - len(ends)
    if ends:
        split = f"{_PP} {size} with {', '.join(f'{flag} {value}' for flag, value in ends.items())}"
        left = f"leaves {rest} of {layers} layers for {stages} stages"
        if stages < 0 or rest < 0 or bool(rest) != bool(stages) or (stages and rest % stages):
            yield f"{split} {left}; expected as many layers in each of them"
            return
    elif layers % size:
        yield (
            f"{_PP} {size} does not divide the {layers} layers; use {_words(_divisors(layers))}, or an uneven split "
            f"with {_FIRST}, {_LAST} or {_LAYOUT}"
        )
        return
    if len(ends) == size > 1 and (args.num_virtual_stages_per_pipeline_rank or 1) > 1:
        # Megatron-Core 0.19 divides by the number of stages between them.
        yield f"{_CHUNKS} with {' and '.join(ends)} needs a stage between the first and the last; leave out {_LAST}"
    counts = {f"the {value} layers of {flag}": value for flag, value in ends.items()}
    if stages:
        counts[f"the {rest // stages} layers of a stage"] = rest // stages
    flag, chunks = _CHUNKS, args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage is not None:
        flag, chunks = _CHUNK_LAYERS, args.num_layers_per_virtual_pipeline_stage
    for what, count in counts.items():
        if count % (chunks or 1):
            yield f"{flag} {chunks} does not divide {what}; use {_words(_divisors(count))}"


def _virtual_stages(args: argparse.Namespace, config: Config) -> int:
    """The number of virtual stages of a pipeline rank."""
    size = args.pipeline_model_parallel_size
    if args.pipeline_model_parallel_layout is not None:
        return len(_parsed(args.pipeline_model_parallel_layout)) // size
    if args.num_layers_per_virtual_pipeline_stage is not None:
        return int(config.text.num_layers // size // args.num_layers_per_virtual_pipeline_stage)
    return int(args.num_virtual_stages_per_pipeline_rank or 1)


def _interleaving(args: argparse.Namespace) -> Iterator[str]:
    """What virtual stages require of the pipeline and of the micro-batches."""
    size = args.pipeline_model_parallel_size
    if size == 1:
        yield f"virtual pipeline stages need {_PP} above 1"
        return
    if not args.overlap_p2p_comm:
        yield "virtual pipeline stages are rejected with --no-overlap-p2p-communication; leave it out"
    group = args.microbatch_group_size_per_vp_stage or size
    if group < size:
        yield f"--microbatch-group-size-per-virtual-pipeline-stage {group} is below {_PP} {size}"
    # Without the argument Megatron takes one pack of each data-parallel rank.
    for flag, batch in ({"--global-batch-size": _dp(args)} | _batches(args)).items():
        count = batch // _dp(args)
        if batch % _dp(args) == 0 and (group > count or 0 < count % group < size):
            yield (
                f"{flag} {batch} gives {count} micro-batches to each of {_dp(args)} data-parallel ranks; virtual "
                f"pipeline stages need a multiple of {group}, so a {flag} that is a multiple of {group * _dp(args)}"
            )


def _dp(args: argparse.Namespace) -> int:
    sizes = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return max(1, int(args.world_size // sizes))


def _sequence(args: argparse.Namespace, config: Config) -> Iterator[str]:
    length, cp = args.seq_length, args.context_parallel_size
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    unit = lcm(2 * cp if cp > 1 else 1, cp * tp)
    if length % unit:
        sizes = f"{_CP} {cp}" + (f" and --sequence-parallel at {_TP} {tp}" if tp > 1 else "")
        yield f"--seq-length {length} is not a multiple of {unit}, needed for {sizes}; use {_nearest(length, unit)}"
    if length > config.text.max_position_embeddings:
        yield (
            f"--seq-length {length} is above the model's {config.text.max_position_embeddings} positions "
            "(max_position_embeddings in config.json)"
        )
    if cp > 1 and args.pack_multiple_of is not None and args.pack_multiple_of % (2 * cp):
        yield f"--pack-multiple-of {args.pack_multiple_of} is not a multiple of {2 * cp}, needed for {_CP} {cp}"


def _batches(args: argparse.Namespace) -> dict[str, int]:
    batches = {
        "--global-batch-size": args.global_batch_size,
        "--eval-global-batch-size": args.eval_global_batch_size,
    }
    return {flag: batch for flag, batch in batches.items() if batch is not None}


def _batch(args: argparse.Namespace) -> Iterator[str]:
    for flag, size in (
        ("--micro-batch-size", args.micro_batch_size),
        ("--eval-micro-batch-size", args.eval_micro_batch_size),
    ):
        if size not in (None, 1):
            yield f"{flag} is {size}, but a micro-batch is one pack: use 1 and a longer --seq-length"
    replicas = _dp(args)
    for flag, batch in _batches(args).items():
        if batch % replicas and not args.decrease_batch_size_if_needed:
            use = _nearest(batch, replicas)
            yield f"{flag} {batch} is not a multiple of the {replicas} data-parallel ranks; use {use}"


def _learning_rate(args: argparse.Namespace) -> Iterator[str]:
    if args.lr is not None and args.min_lr is not None and not 0 <= args.min_lr <= args.lr:
        yield f"--min-lr is {args.min_lr}, expected 0 to --lr {args.lr}"
    if args.train_iters is not None and args.train_samples is not None:
        yield f"--train-iters {args.train_iters} and --train-samples {args.train_samples}: use one of them"
    decay = args.lr_decay_iters or args.train_iters
    if decay is not None and args.lr_warmup_fraction is None and args.lr_warmup_iters >= decay:
        yield f"--lr-warmup-iters {args.lr_warmup_iters}: expected fewer than the {decay} iterations of the schedule"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(number: int, unit: int) -> str:
    """The multiples of `unit` on both sides."""
    below = number - number % unit
    return _words([n for n in (below, below + unit) if n])


def _words(values: list[int]) -> str:
    shown = [str(n) for n in values]
    if len(shown) > 10:
        return ", ".join(shown[:10]) + ", ..."
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
