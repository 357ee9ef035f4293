"""Transformer Engine's Python on a CPU: the TE backend without a GPU, for these tests alone.

Everything in Python is the installed one: the project's TE backend, Megatron's `TE*` classes, Transformer Engine. Only
the compiled extension is a stand-in (`tests.te.extension`), and CUDA calls are answered with the CPU.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from megatron_vlbridge.backends import cpu_runtime
from tests.te import extension, references
from tests.te.references import fla, fused_weight_gradient_mlp_cuda

_enabled = False


def enable() -> None:
    """Let Transformer Engine run on this process's CPU; before the first import of Megatron. Once is enough."""
    global _enabled
    if _enabled:
        return
    _enabled = True
    assert not torch.cuda.is_available(), "there is a GPU here: nothing has to be replaced"
    # It asks for the properties of a GPU, if there seems to be one.
    importlib.import_module("fla.ops.gated_delta_rule")
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    # Torch's data loader asks this before it pins memory, which takes a driver.
    torch.accelerator.is_available = lambda: False
    _replace_extension()
    mode = _TensorsOnCuda()
    cpu_runtime.replace_cuda(mode)
    _keep_in_backward(mode)
    _wait_once_for_p2p()
    fla.install()


def _replace_extension() -> None:
    """Let Transformer Engine import the stand-in, and no CUDA libraries."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    # Without this, the package warns of the missing extension when its loader is imported.
    os.environ["NVTE_FRAMEWORK"] = "none"
    import transformer_engine.common

    extension.install(references.functions())
    sys.modules["fused_weight_gradient_mlp_cuda"] = fused_weight_gradient_mlp_cuda
    transformer_engine.common.load_framework_extension = lambda framework: None


def _keep_in_backward(mode: torch.overrides.TorchFunctionMode) -> None:
    """Run backward passes in the mode too: torch leaves it in `backward`, as in any function that it handles."""
    run = torch.autograd._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_in_mode


def admit_fp32_to_fused_attention() -> None:
    """Let attention in fp32 go where bf16 goes: cuDNN's kernels, also over context-parallel ranks; once.

    They take 16 bits alone. Without this, Transformer Engine and the guards decide as for a user.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    from megatron_vlbridge.backends import te

    choose = utils.get_attention_backend
    utils.get_attention_backend = lambda params: choose(dataclasses.replace(params, qkv_dtype=torch.bfloat16))
    # FusedAttention asserts float16 or bfloat16.
    backends.torch = _TorchWithFloat32AsFloat16("torch")
    # So do the guards of a user's run.
    te.KERNEL_DTYPES = (*te.KERNEL_DTYPES, torch.float32)


class _TorchWithFloat32AsFloat16(ModuleType):
    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _wait_once_for_p2p() -> None:
    """A second wait for one message, as the exchange of key and value gradients has it, would block gloo."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    communicate = context_parallel.flash_attn_p2p_communicate
    context_parallel.flash_attn_p2p_communicate = lambda *args: [_WaitOnce(request) for request in communicate(*args)]


class _WaitOnce:
    def __init__(self, request: Any) -> None:
        self.request = request

    def wait(self) -> None:
        """Wait, the first time."""
        request, self.request = self.request, None
        if request is not None:
            request.wait()


class _TensorsOnCuda(cpu_runtime.CudaIsCpu):
    """Tensors also say that they are on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:
            return True
        return super().__torch_function__(func, types, args, kwargs)
