"""What runs inside the workers for the tests of what a run measures."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.rerun_state_machine import get_rerun_state_machine

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.metrics.csv_file import CsvFile
from megatron_vlbridge.training.metrics.meter import Meter
from megatron_vlbridge.training.step import vlm_step
from tests.functional import ranks
from tests.functional.pool import Layout

Pack = Mapping[str, torch.Tensor]
LINE = (
    " iteration {:8d}/       9 | consumed samples: 2 | elapsed time per iteration (ms): 250.0 | learning rate: "
    "1.000000E-03 | global batch size:     2 | lm loss: 5.0E+00 | mtp_1 loss: 6.0E+00 | loss scale: 1.0 | grad norm: "
    "6.024 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)


class Run:
    """A model on this rank with a meter, and steps as Megatron's training loop makes them."""

    def __init__(self, layout: Layout, folder: Path, csv_file: CsvFile | None = None, **options: Any) -> None:
        chunks = ranks.build_chunks(layout, folder, **options)
        config = chunks[0].config
        router_loss = bool(config.moe_aux_loss_coeff or config.moe_z_loss_coeff)
        self.meter = Meter(chunks[0].hf_config, csv_file, router_loss=router_loss, first_item=lambda: 100)
        config.finalize_model_grads_func = self.meter.finalize
        ddp = DistributedDataParallelConfig()
        self.chunks = chunks
        self.model = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]

    def step(self, packs: Sequence[Pack], iteration: int = 0, *, train: bool = True) -> list[Any]:
        """The reports of the micro-batches."""
        get_rerun_state_machine().current_iteration = iteration
        for chunk in self.model:
            chunk.train(train)
            chunk.zero_grad_buffer()
        step = partial(vlm_step, meter=self.meter)
        return ranks._run(self.model, step, ranks._mine(packs), forward_only=not train)

    def log(self, iteration: int) -> str:
        """What the rank prints where Megatron logs the iteration."""
        with redirect_stdout(io.StringIO()) as printed:
            self.meter.print_rank_last(LINE.format(iteration))
        return printed.getvalue()


def lines(
    layout: Layout, folder: Path, steps: Sequence[Sequence[Pack]], csv_file: Path
) -> tuple[list[str], Counter[int]]:
    """The line of each of the steps, each run twice as Megatron's rerun state machine may, with evaluations between.

    And how many conversations of each source the rank has counted as replaced.
    """
    run, printed = Run(layout, folder, CsvFile(csv_file)), []
    for iteration, packs in enumerate(steps, start=1):
        run.step(packs, iteration)
        run.step(packs, iteration)
        run.step(packs, iteration, train=False)
        printed.append(run.log(iteration))
    return printed, run.meter.replaced


def errors(layout: Layout, folder: Path, steps: Sequence[Sequence[Pack]], weight: str = "") -> list[str]:
    """The error of each step, empty where there is none. `weight`: one that is not finite in the last step."""
    run, found = Run(layout, folder), []
    for iteration, packs in enumerate(steps, start=1):
        if iteration == len(steps):
            _spoil(run, weight)
        try:
            run.step(packs, iteration)
            found.append("")
        except VLBridgeError as error:
            found.append(str(error))
    return found


def _spoil(run: Run, weight: str) -> None:
    for chunk in run.chunks:
        for name, parameter in chunk.named_parameters():
            if name == weight:
                parameter.data.view(-1)[0] = float("nan")


def unsupervised(layout: Layout, folder: Path, packs: Sequence[Pack], **options: Any) -> dict[str, Any]:
    """The reports of a step, and the largest gradient."""
    run = Run(layout, folder, **options)
    reports = run.step(packs, 1)
    gradients = [float(x.main_grad.abs().max()) for chunk in run.chunks for x in chunk.parameters()]
    return {"reports": [report["lm loss"] for report in reports], "gradient": max(gradients)}
