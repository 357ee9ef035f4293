"""Transformer Engine's Python and Megatron's modules of it on a CPU: the TE backend without a GPU, for these tests alone.

Everything in Python is the installed one: the project's TE backend, Megatron's `TE*` classes, Transformer Engine. Only
the compiled extension is a stand-in (`tests.te.extension`), and CUDA calls are answered with the CPU.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from megatron_vlbridge.backends import cpu_runtime
from tests.te import extension, references


def enable() -> None:
    """Let Transformer Engine run on this process's CPU; before the first import of Megatron."""
    assert not torch.cuda.is_available(), "there is a GPU here: nothing has to be replaced"
    torch.cuda.is_available = lambda: True
    _import_transformer_engine()
    cpu_runtime.replace_cuda(_TensorsOnCuda())


def _import_transformer_engine() -> None:
    """Import it with the stand-in for its extension, and without the CUDA libraries."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    # Without this, the missing extension is warned of when the package is first imported, for its loader.
    os.environ["NVTE_FRAMEWORK"] = "none"
    import transformer_engine.common

    extension.install(references.functions())
    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch


class _TensorsOnCuda(cpu_runtime.CudaIsCpu):
    """Tensors also say that they are on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:
            return True
        return super().__torch_function__(func, types, args, kwargs)
