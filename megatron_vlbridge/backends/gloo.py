"""Collectives with parts of different sizes, which Megatron's token dispatchers use and gloo has not."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Put them in the place of torch's, which still serve wherever the parts are of one size."""
    dist.all_to_all_single = _all_to_all_single(dist.all_to_all_single)
    dist.all_gather = _all_gather(dist.all_gather)
    dist.reduce_scatter = _reduce_scatter(dist.reduce_scatter)


def _all_to_all_single(torchs: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the sizes also as tensors."""

    def all_to_all_single(output: torch.Tensor, input: torch.Tensor, *sizes: Any, **kwargs: Any) -> Any:  # noqa: A002
        kwargs = dict(zip(("output_split_sizes", "input_split_sizes"), sizes, strict=False)) | kwargs
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return torchs(output, input, **kwargs)

    return all_to_all_single


def _all_gather(torchs: Callable[..., Any]) -> Callable[..., Any]:
    def all_gather(tensor_list: Sequence[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        longest = max(len(part) if part.dim() else 1 for part in tensor_list)
        if all(part.shape == tensor_list[0].shape for part in tensor_list):
            return torchs(tensor_list, tensor, *args, **kwargs)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        torchs(gathered, padded, *args, **kwargs)
        for part, rows in zip(tensor_list, gathered, strict=True):
            part.copy_(rows[: len(part)])
        return None

    return all_gather


def _reduce_scatter(torchs: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_scatter(
        output: torch.Tensor, input_list: Sequence[torch.Tensor], *args: Any, group: Any = None, **kwargs: Any
    ) -> Any:
        if all(part.shape == input_list[0].shape for part in input_list):
            return torchs(output, input_list, *args, group=group, **kwargs)
        total = torch.cat(list(input_list))
        dist.all_reduce(total, group=group)
        output.copy_(total.split([len(part) for part in input_list])[dist.get_rank(group)])
        return None

    return reduce_scatter
