"""`megatron.training.pretrain` for Qwen3-VL: Megatron's own arguments, and the few that it has not.

The architecture is read from the Hugging Face folder, so no argument repeats it. Written for Megatron-Core 0.19.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import megatron.core.datasets.utils
import megatron.training.training
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import initialize_megatron
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_vlbridge.backends import cpu_runtime
from megatron_vlbridge.checkpoint.live import load_hf_weights
from megatron_vlbridge.config import Config, read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.mtp import embedding_ranks
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.guards import check_layout
from megatron_vlbridge.training.step import vlm_step

# Arguments of the architecture that are None in Megatron unless somebody gave them.
_NO_DEFAULT = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "vocab_size",
    "mtp_num_layers",
)

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
    group.add_argument("--hf-folder", required=True, help="Hugging Face folder: config.json and processor files")
    group.add_argument("--hf-weights", action="store_true", help="start from the weights in --hf-folder")
    group.add_argument("--conversations", required=True, help="JSON lines of {'messages': [...]}, pictures by path")
    group.add_argument("--valid-conversations", help="the same, for evaluation")
    group.add_argument("--pack-multiple-of", type=int, help="room of a conversation in a pack (default: what CP needs)")
    group.add_argument("--no-vision-balance", action="store_true", help="each context-parallel rank runs all frames")
    group.add_argument(
        "--allow-unproved-combination", action="store_true", help="run dimensions together that no test runs together"
    )
    group.add_argument("--cpu", action="store_true", help="run on CPU processes over gloo")
    return parser


def parse_arguments() -> argparse.Namespace:
    """Megatron's and our arguments of the command line, completed from the checkpoint's config and made global.

    Raises:
        VLBridgeError: where an argument contradicts the checkpoint.
    """
    args = parse_args(add_arguments)
    config = read_config(args.hf_folder)
    if args.micro_batch_size not in (None, 1):
        raise VLBridgeError(
            f"--micro-batch-size is {args.micro_batch_size}, but a micro-batch is one pack: "
            "use 1 and a longer --seq-length"
        )
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, name):
            raise VLBridgeError(
                f"--{name.replace('_', '-')} is not proved equal to transformers, so it is refused; leave it out "
                "(--use-distributed-optimizer spreads the optimizer's state)"
            )
    args.micro_batch_size = 1
    for name, value in _architecture_arguments(config).items():
        given = getattr(args, name)
        if name in _NO_DEFAULT and given not in (None, value):
            flag = f"--{name.replace('_', '-')}"
            raise VLBridgeError(f"{flag} is {given}, but {args.hf_folder} says {value}; leave it out")
        setattr(args, name, value)
    if args.pack_multiple_of is None:
        args.pack_multiple_of = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    if cpu_runtime.is_enabled():
        for name, value in _CPU_ARGUMENTS.items():
            setattr(args, name, value)
    if args.valid_conversations is None:
        # Megatron counts evaluations even where there is nothing to evaluate on.
        args.eval_iters, args.eval_interval = 0, args.eval_interval or args.train_iters or 1
    validate_args(args)
    args.padded_vocab_size = calculate_padded_vocab_size(
        config.text.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    set_global_variables(args)
    return args


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
    experts = {} if text.moe is None else {"num_experts": text.moe.num_experts}
    return experts | {
        "num_layers": text.num_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": text.head_dim,
        "max_position_embeddings": text.max_position_embeddings,
        "position_embedding_type": "none",
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
