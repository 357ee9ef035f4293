"""What functions of Transformer Engine's extension compute, in torch: the references of the stand-in.

Written from the calls in Transformer Engine's Python and its docstrings, for what a Qwen3-VL needs: no FP8, no overlap
of communication with a matrix product, no dropout; what else is asked for fails. They check their arguments where a
kernel would read or write memory that is not its own.

Shapes: T tokens, H hidden size, N heads, D head width, R rows of a matrix.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tests.te.references import attention, context_parallel, device, gemm, norms, optimizer

_MODULES: tuple[ModuleType, ...] = (attention, context_parallel, device, gemm, norms, optimizer)


def functions() -> dict[str, Callable[..., Any]]:
    """The references by the name of the extension's function."""
    return {
        name: value
        for module in _MODULES
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
