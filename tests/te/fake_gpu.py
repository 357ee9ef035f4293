"""A GPU that is not there, for the construction of Transformer Engine's modules on a CPU.

Transformer Engine asks which GPU it builds for, and Megatron-Core makes streams and reads the GPU's random state. With
these questions answered, and parameters on the CPU (`use_cpu_initialization`), a model of Transformer Engine's modules
can be built, described, filled and saved where there is no GPU. Nothing of it can run: a kernel fails without a driver.
That is why this stands in these tests alone and is no backend.
"""

import types
from typing import Any

import torch


class _Nothing:
    """Stands for a stream or an event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


def enable() -> None:
    """Answer as one GPU of compute capability 9.0; before the first import of Transformer Engine."""
    assert not torch.cuda.is_available(), "there is a GPU here: nothing has to be faked"
    properties = types.SimpleNamespace(major=9, minor=0, name="none", total_memory=2**36, multi_processor_count=132)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        # Where the loader and the saver put their own small tensors.
        "current_device": lambda: torch.device("cpu"),
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: properties,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "manual_seed": lambda seed: None,
        "synchronize": lambda *args: None,
        "Stream": _Nothing,
        "Event": _Nothing,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
