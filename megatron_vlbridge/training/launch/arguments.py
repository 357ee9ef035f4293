"""The command line of a training run: Megatron's own arguments, and the few that it does not have.

The architecture is read from the Hugging Face folder. Written for Megatron-Core 0.19.
"""

import argparse
import sys
from typing import Any

import torch
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_vlbridge import families
from megatron_vlbridge.backends import cpu_runtime
from megatron_vlbridge.checkpoint.hf.hub import find_folder
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import read_config
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.training import console
from megatron_vlbridge.training.guards import ALLOW, allow_words, check_layout
from megatron_vlbridge.training.launch.data import add_data_arguments, check_data_arguments
from megatron_vlbridge.training.launch.labels import add_label_arguments
from megatron_vlbridge.training.launch.lora import add_lora_arguments, check_lora_arguments, keep_base
from megatron_vlbridge.training.launch.media import add_media_arguments, media_options
from megatron_vlbridge.training.launch.packing import add_packing_arguments, packing_options
from megatron_vlbridge.training.launch.parser import make_parser, parse_words
from megatron_vlbridge.training.launch.parts import add_part_arguments, check_part_arguments
from megatron_vlbridge.training.launch.preflight import check_arguments
from megatron_vlbridge.training.launch.start import (
    check_resumed,
    check_source,
    check_trackers,
    loads_checkpoint,
    megatron_errors,
    schedule,
)
from megatron_vlbridge.training.launch.stop import set_stop_arguments, stop_on_interrupt
from megatron_vlbridge.training.metrics.csv_file import check_new_file

# Fields of Megatron's TransformerConfig that the arguments have under another name.
_RENAMED = {"num_moe_experts": "num_experts", "gated_linear_unit": "swiglu"}
# Fields that follow from other arguments.
_DERIVED = ("activation_func", "bias_activation_fusion")

# Megatron would fuse these with kernels that only a GPU has.
_CPU_ARGUMENTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "masked_softmax_fusion": False,
    "no_persist_layer_norm": True,
    "apply_rope_fusion": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The arguments that Megatron does not have."""
    group = parser.add_argument_group("megatron-vlbridge")
    group.add_argument("--hf-folder", help="(required) Hugging Face folder or Hub id: config.json and processor files")
    group.add_argument("--hf-weights", action="store_true", help="start from the weights in --hf-folder")
    group.add_argument(
        "--random-mtp",
        action="store_true",
        help="with --hf-weights: the MTP layer, which the config.json has and the weights have not, starts at random",
    )
    group.add_argument("--random-weights", action="store_true", help="start from random weights")
    add_data_arguments(group)
    add_media_arguments(group)
    add_label_arguments(group)
    group.add_argument("--pack-multiple-of", type=int, help="room of a conversation in a pack (default: what CP needs)")
    add_packing_arguments(group)
    group.add_argument("--no-vision-balance", action="store_true", help="each context-parallel rank runs all frames")
    group.add_argument(
        "--check-position-ids", action="store_true", help="position_ids of packs must be those that are computed"
    )
    group.add_argument(
        ALLOW,
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="NAME[,NAME...]",
        help="run settings, or dimensions together (tp+ep), that no test verifies",
    )
    add_part_arguments(group)
    add_lora_arguments(group)
    group.add_argument("--metrics-csv", metavar="FILE", help="write a row for each logged iteration to this file")
    group.add_argument("--cpu", action="store_true", help="run on CPU processes over gloo")
    group.add_argument("--verbose", action="store_true", help="print Megatron's whole log instead of a short one")
    return parser


def parse_arguments() -> argparse.Namespace:
    """Megatron's and our arguments of the command line, completed from the checkpoint's config and made global.

    Everything is checked here that can be checked without a model: sizes and layout, the source of the weights, and
    whether a checkpoint continues. A Hub id in `hf_folder` becomes the folder that it is in the Hub's cache.

    Raises VLBridgeError where an argument is unknown, cannot run, contradicts the checkpoint or is not verified.
    """
    console.start()
    parser = make_parser(add_arguments)
    needed = _reject_unverified(parse_words(parser, sys.argv[1:]))
    args = parse_args(add_arguments)
    if args.hf_folder is None:
        raise VLBridgeError("--hf-folder is missing: a Hugging Face folder or Hub id with config.json")
    name = args.hf_folder
    args.hf_folder = str(find_folder(name, weights=False))
    config = read_config(args.hf_folder)
    _set_architecture(args, config, parser)
    check_arguments(args, config)
    check_part_arguments(args, config)
    check_lora_arguments(args, config)
    check_data_arguments(args)
    packing_options(args)
    media_options(args)
    _set_defaults(args)
    if args.hf_weights and (args.lora_rank or not loads_checkpoint(args)):
        args.hf_folder = str(find_folder(name))
    check_source(args)
    keep_base(args)
    check_trackers(args)
    if args.metrics_csv and args.rank == args.world_size - 1:
        check_new_file(args.metrics_csv, resumes=bool(args.load))
    with megatron_errors(), console.argument_warnings():
        validate_args(args)
        args.padded_vocab_size = calculate_padded_vocab_size(
            config.text.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
        layout = language_config(config, core_transformer_config_from_args(args))
    needed |= check_layout(layout, config, allow=args.allow_unverified)
    if unneeded := sorted(set(args.allow_unverified) - needed):
        raise VLBridgeError(f"{ALLOW}: nothing that is rejected has the name {', '.join(unneeded)}; leave it out")
    if args.eval_interval is None:
        # Megatron counts the samples of evaluations even where there are none. Never during training, as it reads None
        # where it trains: once, after the last iteration.
        args.eval_interval = 1 + (args.train_iters or args.train_samples // args.global_batch_size)
    set_stop_arguments(args)
    with megatron_errors():
        set_global_variables(args)
    stop_on_interrupt(args)
    if not args.skip_train:
        schedule(args)
    check_resumed(args)
    return args


def _reject_unverified(args: argparse.Namespace) -> set[str]:
    """What `training.guards` does not see, since it is not part of the model's config; what was needed of `allow`."""
    own_split = "leave it out, or split with --decoder-first-pipeline-num-layers, -last- or a layout"
    no_support = {
        "checkpoint_activations": "use --recompute-granularity",
        "use_checkpoint_args": "leave it out (the architecture is read from --hf-folder)",
        "non_persistent_ckpt_type": "leave it out (runs save to --save and continue from --load alone)",
        "yaml_cfg": "give the arguments on the command line",
    }
    unverified = {
        "use_megatron_fsdp": "leave it out (--use-distributed-optimizer spreads the optimizer's state)",
        "use_torch_fsdp2": "leave it out (--use-distributed-optimizer spreads the optimizer's state)",
        "account_for_embedding_in_pipeline_split": own_split,
        "account_for_loss_in_pipeline_split": own_split,
    }
    rejected = {name: remedy for name, remedy in no_support.items() if getattr(args, name)}
    found = {name: remedy for name, remedy in unverified.items() if getattr(args, name)}
    elementwise = "use adam or sgd, which treat all elements alike"
    if "muon" in args.optimizer:
        reason = "Megatron-Core 0.19 splits the vision tower's linear_qkv.weight by the language model's heads"
        rejected[f"optimizer {args.optimizer}"] = f"{reason}; {elementwise}"
    elif args.optimizer not in ("adam", "sgd"):
        found["optimizer"] = elementwise
    if args.ckpt_format != "torch_dist" and not args.ckpt_convert_format:
        rejected[f"ckpt_format {args.ckpt_format}"] = "use torch_dist, the format that vlbridge exports"
    if args.main_grads_dtype not in ("fp32", torch.float32):
        found["main_grads_dtype"] = "use fp32"
    needed = found.keys() & set(args.allow_unverified)
    for name, remedy in (rejected | found).items():
        if name in needed:
            continue
        option = f" ({allow_words({name}, args.allow_unverified)})" if name in found else ""
        raise VLBridgeError(
            f"--{name.replace('_', '-')} is not verified equal to transformers, so it is rejected; {remedy}{option}"
        )
    return needed


def _set_architecture(args: argparse.Namespace, config: Config, parser: argparse.ArgumentParser) -> None:
    flags = {action.dest: action.option_strings[0] for action in parser._actions}
    for name, value in _architecture_arguments(config).items():
        given = getattr(args, name)
        if given not in (value, parser.get_default(name)):
            raise VLBridgeError(
                f"{flags[name]} is {given}, but the model of {args.hf_folder} has {value}; leave it out, it is set "
                "from config.json"
            )
        setattr(args, name, value)


def _set_defaults(args: argparse.Namespace) -> None:
    args.micro_batch_size = 1
    if args.pack_multiple_of is None:
        args.pack_multiple_of = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    if cpu_runtime.is_enabled():
        for name, value in _CPU_ARGUMENTS.items():
            setattr(args, name, value)
    if args.save and args.save_interval is None:
        # Megatron needs an interval; a run also saves at its end.
        args.save_interval = args.train_iters or args.train_samples


def _architecture_arguments(config: Config) -> dict[str, Any]:
    """The arguments that a checkpoint decides: the fields of its `TransformerConfig`, and what has no such field."""
    fields = families.find(config).language_fields(config)
    return {_RENAMED.get(name, name): value for name, value in fields.items() if name not in _DERIVED} | {
        "group_query_attention": True,
        "max_position_embeddings": config.text.max_position_embeddings,
        "position_embedding_type": "none",
        "rotary_base": config.text.rope_theta,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "calculate_per_token_loss": True,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": config.text.vocab_size,
    }
