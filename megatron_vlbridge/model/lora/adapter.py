"""An adapter beside one of Megatron's linear layers: A and B for each Hugging Face projection in its weight.

The output of a projection W is `W x + alpha / rank * B A x`. A column-parallel layer has A whole on each rank and its
rows of B, a row-parallel one its columns of A and B whole; only the product with A, `rank` wide, is communicated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.nn.functional import dropout, linear, pad

Run = tuple[int, int]
"""First index and count."""


@dataclass(frozen=True)
class Part:
    """What a rank has of a Hugging Face weight `[out, in]` in one of its linear layers.

    `rows` are runs of its rows, in their order; none where they are on other tensor-parallel ranks. Of `experts`
    experts that share a tensor it is that of `expert`.
    """

    weight: str
    shape: tuple[int, int]
    rows: tuple[Run, ...]
    columns: Run
    expert: int | None = None
    experts: int | None = None

    @property
    def key(self) -> str:
        """Tells the parts of a layer from each other: the name of the projection."""
        return self.weight.removesuffix(".weight").rpartition(".")[2]


@dataclass(frozen=True)
class Placement:
    """How a linear layer is spread over ranks: by rows of its input (`row`) or of its output, over the ranks of `tp`.

    `dp` are the ranks with copies of it. `sequence`: its input or output is this rank's part of the sequence.
    """

    row: bool
    expert: bool
    sequence: bool
    tp: torch.distributed.ProcessGroup
    dp: torch.distributed.ProcessGroup


class Adapter(torch.nn.Module):
    """`[..., in]` -> what is added to the output of the linear layer.

    `order` has for each output the index of its row in B of all `parts`, one below the other, or their number where no
    part has it. `weight` is one of the layer's, for dtype, device and the group that its gradient is reduced over.
    """

    order: torch.Tensor | None

    def __init__(
        self,
        parts: Sequence[Part],
        order: torch.Tensor,
        placement: Placement,
        weight: torch.nn.Parameter,
        rank: int,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.parts, self.placement = tuple(parts), placement
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        rows = sum(count for part in parts for _, count in part.rows)
        self._is_partial = bool((order == rows).any())
        in_order = torch.equal(order, torch.arange(rows))
        self.register_buffer("order", None if in_order else order.to(weight.device), persistent=False)
        for part in parts:
            count = sum(count for _, count in part.rows)
            self._add(part, "A", (rank, part.columns[1]), weight)
            if count:
                self._add(part, "B", (count, rank), weight)

    def _add(self, part: Part, half: str, shape: tuple[int, int], weight: torch.nn.Parameter) -> None:
        values = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        parameter: Any = torch.nn.Parameter(values)
        sharded = self.placement.row == (half == "A")
        set_tensor_model_parallel_attributes(parameter, sharded, 1 if half == "A" else 0, 1)
        parameter.allreduce = getattr(weight, "allreduce", True)
        # The whole one is used on this rank's part of the sequence; Megatron adds up such gradients.
        parameter.sequence_parallel = self.placement.sequence and not sharded
        self.register_parameter(self.name_of(part, half), parameter)

    @staticmethod
    def name_of(part: Part, half: str) -> str:
        """The name of the parameter A or B of a part."""
        return f"{part.key}_lora_{half}"

    def matrix(self, part: Part, half: str) -> torch.nn.Parameter | None:
        """A `[rank, columns]` or B `[rows, rank]` of a part; B is None where this rank has none of its rows."""
        found: torch.nn.Parameter | None = getattr(self, self.name_of(part, half), None)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        a = torch.cat([self._shared(self.matrix(part, "A"), not self.placement.row) for part in self.parts])
        hidden = self._exchange(linear(self._dropped(x), a))
        # The empty slice keeps the path to the exchange, whose backward all ranks must run.
        outputs = [hidden[..., :0]]
        for part, own in zip(self.parts, hidden.split(self.rank, dim=-1), strict=True):
            b = self.matrix(part, "B")
            if b is not None:
                outputs.append(linear(own, self._shared(b, self.placement.row)))
        output = torch.cat(outputs, dim=-1)
        if self.order is not None:
            output = (pad(output, (0, 1)) if self._is_partial else output)[..., self.order]
        return self.scaling * output

    def _shared(self, parameter: torch.nn.Parameter | None, whole: bool) -> torch.Tensor:
        """Of experts, whose tokens the dispatcher gathers, the gradient of the whole matrix is added up here."""
        assert parameter is not None
        placement = self.placement
        if placement.expert and whole and placement.tp.size() > 1:
            summed: torch.Tensor = copy_to_tensor_model_parallel_region(parameter, group=placement.tp)
            return summed
        return parameter

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.dropout:
            return x
        if self.placement.row or self.placement.sequence:
            # Each tensor-parallel rank has its own part of the input, elsewhere all have the same.
            with get_cuda_rng_tracker().fork():
                return dropout(x, self.dropout)
        return dropout(x, self.dropout)

    def _exchange(self, hidden: torch.Tensor) -> torch.Tensor:
        """The product with A for all tokens (column-parallel), or for this rank's tokens (row-parallel)."""
        placement, group = self.placement, self.placement.tp
        if placement.expert or group.size() == 1:
            return hidden
        found: torch.Tensor
        if placement.row and placement.sequence:
            found = reduce_scatter_to_sequence_parallel_region(hidden, group=group)
        elif placement.row:
            found = reduce_from_tensor_model_parallel_region(hidden, group=group)
        elif placement.sequence:
            found = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            found = copy_to_tensor_model_parallel_region(hidden, group=group)
        return found

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """None: the model describes its adapters (`model.lora.entries`), apart from the weights beside them."""
        return {}


class GroupedAdapter(torch.nn.Module):
    """The adapters of a layer that holds several experts: `[tokens, in]`, ordered by expert."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(adapters)

    def forward(self, x: torch.Tensor, tokens_per_expert: Sequence[int]) -> torch.Tensor:
        """See the class."""
        parts = x.split(list(tokens_per_expert))
        return torch.cat([adapter(part) for adapter, part in zip(self.experts, parts, strict=True)])

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """See :class:`Adapter`."""
        return {}


def add_output(adapter: torch.nn.Module, layer: torch.nn.Module, args: Sequence[Any], output: Any) -> Any:
    """A forward hook of a linear layer: its output `(values, bias)` with that of its adapter."""
    values, bias = output
    return values + adapter(_normed(layer, args[0]), *args[1:]), bias


def _normed(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The input of the linear map: where the layer begins with a norm, after it."""
    weight = getattr(layer, "layer_norm_weight", None)
    if weight is None:
        return x
    scale = weight.float() + 1 if layer.zero_centered_gamma else weight.float()
    if layer.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x.float(), scale.shape, scale, layer.eps).to(x.dtype)
    bias = layer.layer_norm_bias.float()
    return torch.nn.functional.layer_norm(x.float(), scale.shape, scale, bias, layer.eps).to(x.dtype)
