"""What runs inside the workers of `test_no_sync.py`."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlbridge.model.inputs import PackedInputs
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.batch import read_pack
from tests.functional.pool import Layout
from tests.functional.ranks import build_model

aten = torch.ops.aten
# Their result is a host number, or has a shape that only the device knows.
ASKING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
MOVING = {aten._to_copy, aten.copy_, aten.lift_fresh}


# Compares two states of the host's random generator, whatever the device.
HOST_RNG = "/megatron/core/tensor_parallel/random.py"
# Reads back which mask attention has, a number that it put into a tensor on the host for the recomputation.
HOST_MASK = "/megatron/core/transformer/attention.py", "custom_forward"
# What was asked, and the lines of Megatron and of ours that led to it, the last call first.
Question = tuple[str, list[str]]


def _of_the_host(frame: traceback.FrameSummary) -> bool:
    file, function = HOST_MASK
    return HOST_RNG in frame.filename or (file in frame.filename and frame.name == function)


class Questions(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Question] = []

    def note(self, what: object) -> None:
        frames = [frame for frame in reversed(traceback.extract_stack()) if "/megatron" in frame.filename]
        frames = [frame for frame in frames if "/cpu_runtime.py" not in frame.filename]
        if not frames or not _of_the_host(frames[0]):
            self.asked.append((str(what), [f"{frame.filename}:{frame.lineno}" for frame in frames]))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
        tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
        kind = op.overloadpacket
        if kind == aten.equal and args[0] is args[1]:
            # CUDA's kernel answers this without the device (aten/src/ATen/native/cuda/Equal.cpp).
            return True
        masks = any(x.dtype == torch.bool for x in tensors[1:])
        if kind in ASKING or (kind == aten.index and masks):
            self.note(op)
        # Putting one number where a mask says is a fill, which asks nothing.
        if kind in (aten.index_put, aten.index_put_) and masks and args[2].numel() != 1:
            self.note(op)
        if kind == aten.repeat_interleave and kwargs.get("output_size") is None:
            self.note(op)
        result = op(*args, **kwargs)
        places = {x.device.type for x in tensors if x.dim()}
        if kind in MOVING:
            places |= {result.device.type}
            if len(places) > 1 and not (kwargs.get("non_blocking") or True in args[2:]):
                self.note(f"{op} that waits, {places}")
        elif len(places) > 1:
            self.note(f"{op} on tensors of {places}")
        return result


class HiddenQuestions(TorchFunctionMode):
    """Notes what the dispatcher does not see: numbers of Python that are copied to or from a tensor behind its back."""

    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.tolist:
            self.questions.note("tolist")
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and not result.is_cpu:
            self.questions.note("a tensor of Python's numbers")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and not args[0].is_cpu:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(x, (list, range)) for x in index):
                self.questions.note("an index of Python's numbers")
        return result


@contextmanager
def noted() -> Iterator[list[Question]]:
    """The questions asked inside the block."""
    questions = Questions()
    with questions, HiddenQuestions(questions):
        yield questions.asked


def questions(layout: Layout, folder: Path, pack: Mapping[str, torch.Tensor], **options: Any) -> list[Question]:
    """What forward and backward ask, once the pack has come in at the door."""
    model, inputs = _prepare(layout, folder, pack, **options)
    asked = _forward_backward(model, inputs)
    assert all(parameter.grad is not None for parameter in model.parameters())
    return asked


def questions_without_numbers(
    layout: Layout, folder: Path, pack: Mapping[str, torch.Tensor], **options: Any
) -> list[Question]:
    """The same with all tensors on a device that has no numbers to give: whoever asks for one gets an error."""
    model, inputs = _prepare(layout, folder, pack, **options)
    model, inputs = model.to("meta"), inputs.to(torch.device("meta"))
    with _alone():
        asked = _forward_backward(model, inputs)
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    return asked


def _forward_backward(model: Qwen3VLModel, inputs: PackedInputs) -> list[Question]:
    """What this stage asks in its forward and backward; what stages send each other is none of its own."""
    received = None
    if not model.pre_process:
        received = _hear(parallel_state.get_pipeline_model_parallel_prev_rank()).requires_grad_()
        model.set_input_tensor([received])
    with noted() as asked:
        output = model(inputs=inputs)
    gradient = None
    if not model.post_process:
        _tell(output.detach(), parallel_state.get_pipeline_model_parallel_next_rank())
        gradient = _hear(parallel_state.get_pipeline_model_parallel_next_rank())
    with noted() as asked_backward:
        (output.sum() if gradient is None else output).backward(gradient)
    if received is not None:
        assert received.grad is not None
        _tell(received.grad, parallel_state.get_pipeline_model_parallel_prev_rank())
    return asked + asked_backward


def _tell(tensor: torch.Tensor, rank: int) -> None:
    torch.distributed.send_object_list([tensor], rank)


def _hear(rank: int) -> torch.Tensor:
    heard: list[Any] = [None]
    torch.distributed.recv_object_list(heard, rank)
    return heard[0]


def _prepare(
    layout: Layout, folder: Path, pack: Mapping[str, torch.Tensor], **options: Any
) -> tuple[Qwen3VLModel, PackedInputs]:
    model = build_model(layout, folder, **options)
    inputs = read_pack({key: value[None] for key, value in pack.items()}, model.hf_config)
    inputs = inputs.context_parallel(layout.cp, parallel_state.get_context_parallel_rank(), model.hf_config)
    if layout.sp:
        inputs = inputs.with_sequence_shard(layout.tp, parallel_state.get_tensor_model_parallel_rank())
    return model, inputs


@contextmanager
def _alone() -> Iterator[None]:
    """The loss sums over tensor-parallel ranks, here one; gloo knows no tensors without numbers."""
    assert torch.distributed.get_world_size() == parallel_state.get_pipeline_model_parallel_world_size()
    with patch.object(torch.distributed, "all_reduce", lambda *args, **kwargs: None):
        yield
