"""Linear attention of transformers with kernels that take segments, as on GPUs; a script, since transformers looks for
the kernels when it is imported. Arguments: folders of checkpoints.
"""

import inspect
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

USED = set()


def segments(bounds: list[int]) -> Iterator[slice]:
    """The segments between these bounds."""
    return (slice(begin, end) for begin, end in pairwise(bounds))


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """That of flash-linear-attention: transformers' rule in torch, segment by segment."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    rule = inspect.unwrap(modeling.torch_recurrent_gated_delta_rule)
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    USED.add(("rule", cu_seqlens is not None))
    inputs = (q, k, v, g, beta)
    parts = [
        rule(*(x[:, part] for x in inputs), use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)[0]
        for part in segments(bounds)
    ]
    return torch.cat(parts, dim=1), None


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """That of causal-conv1d: transformers' convolution in torch, segment by segment."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    convolve = inspect.unwrap(modeling.causal_conv1d_fn)
    bounds = [0, x.shape[2]]
    if seq_idx is not None:
        assert (seq_idx.dtype, seq_idx.shape) == (torch.int32, (x.shape[0], x.shape[2]))
        bounds[1:1] = (seq_idx[0].diff().nonzero().flatten() + 1).tolist()
    USED.add(("convolution", seq_idx is not None))
    return torch.cat([convolve(x[:, :, part], weight, bias, activation) for part in segments(bounds)], dim=2)


def install() -> None:
    """Make the kernels importable under the names of their packages."""
    fla: Any = ModuleType("fla")
    fla.ops = SimpleNamespace(gated_delta_rule=SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule))
    conv: Any = ModuleType("causal_conv1d")
    conv.causal_conv1d_fn = causal_conv1d_fn
    for module in (fla, conv):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


def main() -> None:
    install()
    from tests.functional import packed_models

    with packed_models.flash_attention():
        for folder in sys.argv[1:]:
            packed_models.compare(Path(folder), packed_models.IMPLEMENTATIONS, bound=2e-5)
    assert {(part, given) for part in ("rule", "convolution") for given in (False, True)} == USED


if __name__ == "__main__":
    main()
