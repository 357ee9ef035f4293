"""`megatron.training.pretrain` for Qwen3-VL: Megatron's own arguments, and the few that it has not.

The architecture is read from the Hugging Face folder, so no argument repeats it. Written for Megatron-Core 0.19.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core.datasets.utils
import megatron.training.training
import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.checkpointing import checkpoint_exists, get_checkpoint_tracker_filename
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import initialize_megatron
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_vlbridge.backends import cpu_runtime
from megatron_vlbridge.checkpoint.hub import find_folder
from megatron_vlbridge.checkpoint.live import load_hf_weights
from megatron_vlbridge.config import Config, read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.mtp import embedding_ranks
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training import console
from megatron_vlbridge.training.guards import accept, check_layout
from megatron_vlbridge.training.step import vlm_step
from megatron_vlbridge.training.trackers import check_trackers

# Arguments that Megatron keeps under another name.
_FLAGS = {"layernorm_epsilon": "--norm-epsilon"}

# This rank's virtual stages, while Megatron has them built one by one.
_chunks: list[Qwen3VLModel] = []

# What Megatron would fuse with kernels that only a GPU has.
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
    """The arguments that Megatron has not."""
    group = parser.add_argument_group("megatron-vlbridge")
    group.add_argument(
        "--hf-folder", required=True, help="Hugging Face folder or Hub id: config.json and processor files"
    )
    group.add_argument("--hf-weights", action="store_true", help="start from the weights in --hf-folder")
    group.add_argument("--conversations", help="JSON lines of {'messages': [...]}, pictures by path")
    group.add_argument("--valid-conversations", help="the same, for evaluation")
    group.add_argument("--pack-multiple-of", type=int, help="room of a conversation in a pack (default: what CP needs)")
    group.add_argument("--no-vision-balance", action="store_true", help="each context-parallel rank runs all frames")
    group.add_argument(
        "--allow-unproved-combination", action="store_true", help="run dimensions together that no test runs together"
    )
    group.add_argument("--cpu", action="store_true", help="run on CPU processes over gloo")
    group.add_argument("--verbose", action="store_true", help="print Megatron's whole log instead of a short one")
    return parser


def parse_arguments() -> argparse.Namespace:
    """Megatron's and our arguments of the command line, completed from the checkpoint's config and made global.

    A Hub id in `hf_folder` becomes the folder that it is in the Hub's cache.

    Raises:
        VLBridgeError: where an argument contradicts the checkpoint.
    """
    console.start()
    args = parse_args(add_arguments)
    args.hf_folder = str(find_folder(args.hf_folder, weights=args.hf_weights))
    config = read_config(args.hf_folder)
    if args.micro_batch_size not in (None, 1):
        raise VLBridgeError(
            f"--micro-batch-size is {args.micro_batch_size}, but a micro-batch is one pack: "
            "use 1 and a longer --seq-length"
        )
    _refuse_unproved(args)
    args.micro_batch_size = 1
    _set_architecture(args, config)
    if args.pack_multiple_of is None:
        args.pack_multiple_of = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    if cpu_runtime.is_enabled():
        for name, value in _CPU_ARGUMENTS.items():
            setattr(args, name, value)
        _check_optimizer_state(args)
    if args.conversations and not args.valid_conversations:
        # Megatron counts evaluations even where there is nothing to evaluate on.
        args.eval_iters, args.eval_interval = 0, args.eval_interval or args.train_iters or 1
    check_trackers(args)
    validate_args(args)
    args.padded_vocab_size = calculate_padded_vocab_size(
        config.text.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    set_global_variables(args)
    return args


def _refuse_unproved(args: argparse.Namespace) -> None:
    """What `training.guards` does not see, since it is no part of the model's config."""
    remedies = {
        "use_megatron_fsdp": "leave it out (--use-distributed-optimizer spreads the optimizer's state)",
        "use_torch_fsdp2": "leave it out (--use-distributed-optimizer spreads the optimizer's state)",
        "grad_reduce_in_bf16": "leave it out (gradients are summed in fp32)",
    }
    found = {name: remedy for name, remedy in remedies.items() if getattr(args, name)}
    if args.optimizer not in ("adam", "sgd"):
        # Muon cuts every `linear_qkv.weight` by the language model's heads, the vision tower's too.
        found[f"optimizer {args.optimizer}"] = "use adam or sgd, which treat every number alike"
    if args.main_grads_dtype not in ("fp32", torch.float32):
        found[f"main_grads_dtype {args.main_grads_dtype}"] = "use fp32"
    for name, remedy in found.items():
        raise VLBridgeError(
            f"--{name.replace('_', '-')} is not proved equal to transformers, so it is refused; {remedy}"
        )


def _set_architecture(args: argparse.Namespace, config: Config) -> None:
    defaults = add_megatron_arguments(argparse.ArgumentParser(add_help=False))
    for name, value in _architecture_arguments(config).items():
        given = getattr(args, name)
        if given not in (value, defaults.get_default(name)):
            flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise VLBridgeError(
                f"{flag} is {given}, but the model of {args.hf_folder} has {value}; leave it out, it is set by itself"
            )
        setattr(args, name, value)


def _check_optimizer_state(args: argparse.Namespace) -> None:
    if not args.use_distributed_optimizer or args.finetune or args.no_load_optim:
        return
    if not args.load or not checkpoint_exists(args.load):
        return
    # Only what a run saved has an optimizer's state, an imported folder has none.
    if Path(get_checkpoint_tracker_filename(args.load)).read_text().strip() != "release":
        raise VLBridgeError(
            f"--cpu: Megatron-Core loads the state of --use-distributed-optimizer (in {args.load}) into Transformer "
            "Engine's Adam only; leave --use-distributed-optimizer out in both runs, or start a new state with "
            "--no-load-optim"
        )


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> Qwen3VLModel:
    """Megatron's `model_provider`: this rank's stage of the model that `--hf-folder` describes.

    Its weights come from that folder with `--hf-weights`, unless `--load` holds a checkpoint, which is loaded later.
    """
    args = get_args()
    checkpoint = read_config(args.hf_folder)
    transformer_config = language_config(checkpoint, config or core_transformer_config_from_args(args))
    check_layout(transformer_config, checkpoint, any_combination=args.allow_unproved_combination)
    model = Qwen3VLModel(
        transformer_config,
        checkpoint,
        vocab_size=args.padded_vocab_size,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        balance_vision=not args.no_vision_balance,
        seq_length=args.seq_length,
        pg_collection=pg_collection,
    )
    accept(model)
    if args.hf_weights and not (args.load and checkpoint_exists(args.load)):
        _load_when_complete(model, vp_stage, args)
    return model


def _load_when_complete(model: Qwen3VLModel, vp_stage: int | None, args: argparse.Namespace) -> None:
    """Fill this rank's chunks when Megatron has built the last: only together they must hold every weight."""
    if not vp_stage:
        _chunks.clear()
    _chunks.append(model)
    if len(_chunks) == (args.virtual_pipeline_model_parallel_size or 1):
        load_hf_weights(_chunks, args.hf_folder)
        _chunks.clear()


def run(args: argparse.Namespace, dataset_provider: Callable[..., Any]) -> None:
    """Megatron's `pretrain` with :func:`vlm_step` and :func:`model_provider`.

    `dataset_provider(train_valid_test_num_samples, vp_stage=None)` gives datasets of packs, as for any Megatron run.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        # The wheel ships the built helpers without the Makefile that Megatron would run.
        megatron.core.datasets.utils.compile_helpers = _nothing
    if cpu_runtime.is_enabled():
        megatron.training.training.initialize_megatron = functools.partial(initialize_megatron, allow_no_cuda=True)
    console.begin(args, read_config(args.hf_folder))
    megatron.training.training.pretrain(
        pretrain_cfg_container_from_args(args, None),
        dataset_provider,
        ModelType.encoder_or_decoder,
        vlm_step,
        model_provider,
        get_embedding_ranks=_embedding_ranks,
    )


def _embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Which ranks of a pipeline hold the word embedding; Megatron asks when it makes its process groups."""
    args = get_args()
    tied = not args.untie_embeddings_and_output_weights
    return embedding_ranks(pp_ranks, core_transformer_config_from_args(args), tied)


def _architecture_arguments(config: Config) -> dict[str, Any]:
    text = config.text
    routed = {} if text.moe is None else {"moe_router_topk": text.moe.num_experts_per_tok}
    return routed | {
        "num_experts": text.moe and text.moe.num_experts,
        "moe_ffn_hidden_size": text.moe and text.moe.moe_intermediate_size,
        "num_layers": text.num_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": text.head_dim,
        "max_position_embeddings": text.max_position_embeddings,
        "position_embedding_type": "none",
        "rotary_base": text.rope_theta,
        "normalization": "RMSNorm",
        "layernorm_epsilon": text.rms_norm_eps,
        "qk_layernorm": True,
        "swiglu": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "calculate_per_token_loss": True,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": text.vocab_size,
        "mtp_num_layers": text.num_mtp_layers or None,
    }


def _nothing() -> None: ...
