"""What passes our checks of sizes can be built by Megatron, and what Megatron asserts against is refused in words."""

import contextlib
import io
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_vlbridge import read_config
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from tests import reference
from tests.functional.pool import Layout, Pool

CASES = 200
LAYOUTS = (
    "Etttt|ttL",
    "E|t|tt|tttL",
    "Et|tttttL",
    "E|tttttt|L",
    "Ettt|ttt",
    "ttE|ttttL",
    "Ett|tL",
    "Ex|tL",
    "E(t|)*6L",
)
LAYERS = 6


class Reached(Exception):  # noqa: N818  no error: Megatron's schedule has begun to run the model
    """Megatron's schedule calls the forward step."""


def random_words(dice: random.Random, experts: bool) -> tuple[list[str], int]:
    """Arguments and a number of processes; about half of them can run."""
    tp, pp, cp = dice.choice((1, 1, 1, 2, 2, 4, 3)), dice.choice((1, 2, 2, 2, 3, 6, 4)), dice.choice((1, 1, 1, 2, 3))
    sizes = {"tensor-model-parallel-size": tp, "pipeline-model-parallel-size": pp, "context-parallel-size": cp}
    if dice.random() < (0.6 if experts else 0.05):
        sizes["expert-model-parallel-size"] = dice.choice((2, 2, 2, 4, 3, 8))
        sizes["expert-tensor-parallel-size"] = dice.choice((1, 1, 1, 2, 5))
    split = dice.random()
    if split < 0.15:
        sizes["pipeline-model-parallel-layout"] = dice.choice(LAYOUTS)
    elif split < 0.4:
        some = ("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers")
        sizes |= {flag: dice.choice((0, 1, 2, 2, 4, 8)) for flag in some if dice.random() < 0.5}
    if dice.random() < 0.3:
        sizes["num-virtual-stages-per-pipeline-rank"] = dice.choice((1, 2, 2, 3))
    if dice.random() < 0.1:
        sizes["num-layers-per-virtual-pipeline-stage"] = dice.choice((1, 1, 2, 3))
    world = tp * pp * cp * dice.choice((1, 2, 2, 4))
    if dice.random() < 0.1:
        world = dice.choice((1, 2, 4, 6))
    replicas = max(1, world // (tp * pp * cp))
    batch = replicas * pp * dice.choice((1, 2)) if dice.random() < 0.9 else dice.choice((1, 3, 5, 8))
    length = dice.choice((96, 96, 96, 96, 66, 1024))
    if dice.random() < 0.3:
        # What sequence parallelism asks of the length, Megatron only finds at the first step.
        sizes["sequence-parallel"], length = "", 192
    words = [word for flag, value in sizes.items() for word in (f"--{flag}", str(value)) if word]
    words += ["--seq-length", str(length), "--global-batch-size", str(batch), "--lr", "1", "--train-iters", "2"]
    return [*words, "--moe-token-dispatcher-type", "alltoall"], world


def megatron_runs(args: Any, config: Config, words: list[str], stage: int) -> None:
    """Megatron's checks up to the first forward step of a pipeline stage, on processes that are not there."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import validate_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_vlbridge.model.transformer_config import language_config
    from megatron_vlbridge.model.vlm import Qwen3VLModel

    validate_args(args)
    language = language_config(config, core_transformer_config_from_args(args))
    batches = ConstantNumMicroBatchesCalculator(args.global_batch_size, 1, args.data_parallel_size, False, rank=1)
    ranks, chunks = args.world_size // args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    dist.init_process_group("fake", rank=stage * ranks, world_size=args.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            chunks,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        model = [
            Qwen3VLModel(
                language,
                config,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
                vp_stage=number if chunks else None,
            )
            for number in range(chunks or 1)
        ]
        args.layers = sum(len(chunk.language_model.decoder.layers) for chunk in model)
        schedule = get_forward_backward_func(args.pipeline_model_parallel_size, chunks)
        if stage == 0:
            with contextlib.suppress(Reached):
                schedule(
                    forward_step_func=reached,
                    data_iterator=[iter([])] * len(model) if chunks else iter([]),
                    model=model if chunks else model[0],
                    num_microbatches=batches.get(),
                    seq_length=args.seq_length,
                    micro_batch_size=1,
                    forward_only=True,
                )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def reached(*_: Any) -> Any:
    """A forward step."""
    raise Reached


def verdicts(layout: Layout, folder: Path, experts: bool) -> list[tuple[str, str | None, str | None]]:
    """Of each case the arguments, our refusal and Megatron's."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_vlbridge.training.launch import arguments
    from megatron_vlbridge.training.launch.parser import make_parser
    from megatron_vlbridge.training.launch.preflight import check_arguments

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    parser, config, dice, found = make_parser(arguments.add_arguments), read_config(folder), random.Random(7), []
    for _ in range(CASES):
        words, world = random_words(dice, experts)
        ours = megatrons = None
        layers = 0
        for stage in range(parser.parse_args(words).pipeline_model_parallel_size):
            args = parser.parse_args(["--hf-folder", str(folder), *words])
            args.world_size, args.rank = world, 1
            arguments._set_architecture(args, config, parser)
            try:
                check_arguments(args, config)
            except VLBridgeError as error:
                ours = str(error)
            arguments._set_defaults(args)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    megatron_runs(args, config, words, stage)
                layers += args.layers
            except Exception as error:  # noqa: BLE001  whatever Megatron raises
                megatrons = f"{type(error).__name__}: {error}"
                break
        if megatrons is None and layers != config.text.num_layers:
            megatrons = f"{layers} layers"
        found.append((f"{' '.join(words)} on {world}", ours, megatrons))
    # What the pool takes down.
    dist.init_process_group("fake", rank=0, world_size=1, store=fake_store())
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    return found


def fake_store() -> Any:
    """What a group of processes that are not there is made with."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


@pytest.mark.parametrize("experts", [None, {"num_experts_per_tok": 2}], ids=["dense", "experts"])
def test_sizes_are_refused_where_megatron_refuses_them(pool: Pool, tmp_path: Path, experts: dict | None) -> None:
    folder = reference.write_checkpoint(tmp_path, layers=LAYERS, experts=experts)
    (found,) = pool.run(verdicts, Layout(), folder=folder, experts=experts is not None)
    wrong = [case for case in found if (case[1] is None) != (case[2] is None)]
    assert not wrong, "\n".join(map(str, wrong))
    counts = Counter(ours is None for _, ours, _ in found)
    assert min(counts.values()) > CASES // 6, counts
