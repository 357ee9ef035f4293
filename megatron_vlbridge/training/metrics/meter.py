"""What a run measures: counts of its packs, FLOPs, rates. In Megatron's log line, TensorBoard, W&B and a CSV file."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import is_last_rank, print_rank_last

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.inputs import PackedInputs
from megatron_vlbridge.training.log_lines import Iteration, read_iteration
from megatron_vlbridge.training.metrics.columns import LOSSES, MEASURED
from megatron_vlbridge.training.metrics.counts import PackCounts
from megatron_vlbridge.training.metrics.csv_file import CsvFile
from megatron_vlbridge.training.metrics.loss_check import PackLoss, describe, step_flags

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


class Meter:
    """Counts the packs of a training run and checks its losses; one on each rank, given to `vlm_step`.

    Each pack is counted on one rank, while it is read. `finalize` is Megatron's `finalize_model_grads_func`,
    `print_rank_last` takes the place of Megatron's where it logs. `check_losses`: a loss that is not finite is an
    error. `router_loss`: the model has losses that do not come from supervised tokens. `first_item` gives the item of
    the dataset that is the first pack of the global batch, if it is known.
    """

    def __init__(
        self,
        config: Config,
        csv_file: CsvFile | None = None,
        check_losses: bool = True,
        router_loss: bool = False,
        first_item: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.config, self.csv_file, self.first_item = config, csv_file, first_item
        self.check_losses, self.router_loss = check_losses, router_loss
        self._packs: list[PackCounts] = []
        # By the index of the source, in the packs that this rank has counted: in all, before the last iteration, and
        # since its end.
        self.replaced, self._replaced_before, self._replaced_now = Counter[int](), Counter[int](), Counter[int]()
        self._last_iteration: int | None = None
        self._losses: list[PackLoss] = []
        # Of each iteration since the last line of the log. An iteration that Megatron runs again replaces itself.
        self._iterations: dict[int, PackCounts] = {}
        self._lines = 0

    def note_pack(self, batch: Mapping[str, Any]) -> None:
        """Count a pack, as it comes from the data loader."""
        self._packs.append(PackCounts.of(batch))
        replaced = batch.get("replaced_per_source")
        if replaced is not None:
            self._replaced_now.update(dict(enumerate(replaced[0].tolist())))

    def watch(self, inputs: PackedInputs, loss: LossFunction, losses: torch.Tensor) -> Any:
        """`loss(losses)`, whose results are checked at the end of the step."""
        total, count, report = loss(losses)
        self._losses.append(PackLoss.of(inputs, losses, total, count))
        return total, count, report

    def finalize(self, model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
        """Megatron's `finalize_model_grads`, after a check of the losses.

        Raises VLBridgeError: on all ranks, where a loss is not finite on one.
        """
        number = get_rerun_state_machine().current_iteration
        self._iterations[number] = sum(self._packs, start=PackCounts())
        self._end_replaced(number)
        packs, self._packs, self._losses = self._losses, [], []
        supervised = True
        if self.check_losses or self.router_loss:
            failed, supervised = step_flags(packs)
            if failed and self.check_losses:
                raise VLBridgeError(f"iteration {number}: {describe(model, packs, self.first_item())}")
        finalize_model_grads(model, num_tokens, **options)
        if not supervised and self.router_loss:
            # Divided by no token, their gradients would be larger than usual by the tokens of a global batch.
            for chunk in model:
                chunk.scale_gradients(0.0)

    def _end_replaced(self, number: int) -> None:
        """Add what was replaced in iteration `number`, in the place of what was if Megatron has run it again."""
        if number != self._last_iteration:
            self._replaced_before, self._last_iteration = self.replaced, number
        self.replaced, self._replaced_now = self._replaced_before + self._replaced_now, Counter()

    def print_rank_last(self, message: str) -> None:
        """Megatron's function of this name; adds what was measured to the line of an iteration. Collective there."""
        iteration = read_iteration(message)
        if iteration is not None and self._iterations:
            values = self._measure(iteration)
            message += "".join(f" {MEASURED[column]}: {value!r} |" for column, value in values.items())
            if is_last_rank():
                self._write(iteration, values)
        print_rank_last(message)

    def _measure(self, iteration: Iteration) -> dict[str, float]:
        """The measured columns, as means per iteration since the line before."""
        total = sum(self._iterations.values(), start=PackCounts()).sum_over_ranks()
        iterations, ranks = len(self._iterations), torch.distributed.get_world_size()
        self._lines += 1
        # Megatron does not start anew after the first line of a process.
        if self._lines > 1:
            self._iterations.clear()
        seconds = iteration.seconds * iterations
        flops = total.training_flops(self.config)
        return {
            "packs": _mean(total.packs, iterations),
            "tokens": _mean(total.tokens, iterations),
            "supervised_tokens": _mean(total.supervised_tokens, iterations),
            "images": _mean(total.images, iterations),
            "videos": _mean(total.videos, iterations),
            "patches": _mean(total.patches, iterations),
            "padding_share": total.padding_share,
            "tokens_per_second": total.tokens / seconds,
            "model_flops": _mean(flops, iterations),
            "model_tflops_per_rank": flops / seconds / ranks / 1e12,
        }

    def _write(self, iteration: Iteration, values: dict[str, float]) -> None:
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        for column, value in values.items():
            if writer:
                writer.add_scalar(MEASURED[column], value, iteration.number)
        if wandb:
            wandb.log({MEASURED[column]: value for column, value in values.items()}, iteration.number)
        if self.csv_file is not None:
            losses = {column: iteration.losses.get(name) for column, name in LOSSES.items()}
            head: dict[str, float | None] = {"iteration": iteration.number, "seconds": iteration.seconds}
            others = {"grad_norm": iteration.grad_norm, "learning_rate": iteration.learning_rate}
            self.csv_file.append(head | losses | others | values)


def _mean(total: int, count: int) -> float:
    """An integer where it is one."""
    return total / count if total % count else total // count
