"""Megatron-Core and `megatron.training` on a machine without CUDA.

Megatron-Core names the CUDA device in some 280 places. :func:`enable` answers those calls with the CPU, so that the
unmodified library runs over gloo with the kernels of :mod:`megatron_vlbridge.backends.cpu`. It is switched on
explicitly, before Megatron is imported, and rejected where it would hide a GPU.

Written for Megatron-Core 0.19 and torch 2.13.
"""

import collections
import contextlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_vlbridge.backends import delta_rule, gloo
from megatron_vlbridge.errors import VLBridgeError

_mode: "CudaIsCpu | None" = None


def enable() -> None:
    """Let Megatron-Core run on this process's CPU; calling it again does nothing.

    Raises:
        VLBridgeError: where a GPU is visible, or where Megatron was imported before.

    Example:
        >>> from megatron_vlbridge.backends import cpu_runtime
        >>> cpu_runtime.enable()
        >>> import megatron.core
    """
    global _mode
    if _mode is not None:
        return
    if torch.cuda.is_available():
        raise VLBridgeError(
            f"cpu_runtime.enable() would hide {torch.cuda.device_count()} visible GPU(s). "
            "Set CUDA_VISIBLE_DEVICES='' to run on the CPU on purpose, or do not call it."
        )
    if "megatron.core" in sys.modules:
        raise VLBridgeError(
            "cpu_runtime.enable() was called after megatron.core had been imported, which already bound "
            "torch.compile and Transformer Engine. Call it before the first import of Megatron."
        )
    # Megatron would choose Transformer Engine's fused Adam and norms, which need a GPU.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    mode = CudaIsCpu()
    replace_cuda(mode)
    delta_rule.install()
    _mode = mode


def is_enabled() -> bool:
    """Whether :func:`enable` was called in this process."""
    return _mode is not None


def replace_cuda(mode: "CudaIsCpu") -> None:
    """Answer the CUDA calls of this process with the CPU, tensor functions through `mode`.

    :func:`enable` without its choice of the CPU backend.
    """
    # Megatron asks for it under tensor parallelism, where it orders kernels on a GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron's jit_fuser compiles for a driver that is not there.
    torch.compile = _no_compile
    for name, value in _cuda_replacements().items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.nvtx.range_push = _nothing
    torch.cuda.nvtx.range_pop = _nothing
    gloo.install()
    gloo.set_batch_scheduling()
    _replace_rng_tracker_state()
    _replace_output_checkpoint()
    mode.__enter__()


class CudaIsCpu(TorchFunctionMode):
    """Maps a CUDA `device` argument to the CPU, and answers as a CUDA tensor where Megatron checks the type."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer and gradient clipping compare this string with "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if device is None or isinstance(device, bool) or not isinstance(device, int | str | torch.device):
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


class _NoStream:
    """In place of a CUDA stream or event: every method does nothing."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *args: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_NoStream"]:
        return lambda *args, **kwargs: _NoStream()


def _nothing(*args: object, **kwargs: object) -> None: ...


def _no_stream(*args: object, **kwargs: object) -> _NoStream:
    return _NoStream()


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _no_compile(model: Any = None, *args: object, **kwargs: object) -> Any:
    return model if model is not None else lambda function: function


def _replace_rng_tracker_state() -> None:
    import megatron.core.tensor_parallel.random as rng

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    rng._set_cuda_rng_state = set_rng_state


def _replace_output_checkpoint() -> None:
    """For recomputed modules whose output is not kept. Megatron-Core compiles C++ for it, and asks for FP8 even so."""
    import megatron.core.tensor_parallel.random as rng

    rng._get_share_storage = lambda: _copy_storage
    if not rng.HAVE_TE:
        no_fp8 = {
            "FP8GlobalStateManager": types.SimpleNamespace(is_fp8_enabled=lambda: False),
            "activation_recompute_forward": lambda **kwargs: contextlib.nullcontext(),
            "fp8_autocast": lambda **kwargs: contextlib.nullcontext(),
        }
        for name, value in no_fp8.items():
            setattr(rng, name, value)


def _copy_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give the emptied storage of `output` the values again; Megatron-Core lets it share the other storage."""
    found, storage = recomputed.untyped_storage(), output.untyped_storage()
    storage.resize_(found.nbytes())
    storage.copy_(found)


def _cuda_replacements() -> dict[str, Any]:
    properties = types.SimpleNamespace(total_memory=2**34, major=9, minor=0, name="cpu", multi_processor_count=1)
    # Each name gets a function object of its own: torch's tracing tables reject one object under two names.
    zeros = {
        name: (lambda *args, **kwargs: 0)
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    }
    no_ops = {
        name: (lambda *args, **kwargs: None)
        for name in ("synchronize", "set_device", "reset_peak_memory_stats", "empty_cache")
    }
    return {
        **zeros,
        **no_ops,
        "current_device": lambda: torch.device("cpu"),
        # Megatron builds its process groups only where there are devices.
        "device_count": lambda: 8,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": _no_stream,
        "default_stream": lambda *args, **kwargs: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_device_properties": lambda *args, **kwargs: properties,
        "get_device_capability": lambda *args, **kwargs: (9, 0),
        "memory_stats": lambda *args, **kwargs: collections.defaultdict(int),
    }
