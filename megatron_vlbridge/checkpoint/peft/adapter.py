"""The pairs of a LoRA adapter, for each weight of its base."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.hf.header import read_header
from megatron_vlbridge.checkpoint.peft.config import AdapterConfig, read_adapter_config
from megatron_vlbridge.checkpoint.stream.raw import Stored
from megatron_vlbridge.errors import VLBridgeError

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class LoraPair:
    """A `[r, in]` and B `[out, r]` of one weight, in the file.

    Of `experts` experts A is `[E * r, in]`, expert by expert, and B is `[out, r * E]` with the expert fastest
    (peft 0.21, `ParamWrapper.get_delta_weight`).
    """

    a: Stored
    b: Stored
    scaling: float
    experts: int | None

    def read(self, expert: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`A [r, in]` and `B [out, r]`, of one expert where the weight has experts, as stored."""
        assert (expert is None) == (self.experts is None)
        a, b = (torch.empty(stored.spec.shape, dtype=stored.spec.dtype) for stored in (self.a, self.b))
        self.a.read_into((0, 0), a)
        self.b.read_into((0, 0), b)
        if self.experts is None:
            return a, b
        return a.view(self.experts, -1, a.shape[1])[expert], b.view(b.shape[0], -1, self.experts)[..., expert]


def read_adapter(folder: Path, base: Mapping[str, tuple[int, ...]]) -> dict[str, LoraPair]:
    """The pairs of a PEFT folder by the name of their weight; reads headers only.

    `base` has the name and shape of each weight of the base as transformers holds it: `[out, in]`, of experts
    `[E, out, in]`.

    Raises VLBridgeError, naming file, tensor, expected and found, for a key that fits no weight of the base, a missing
    half, and another rank or shape. Example: `read_adapter(Path("adapter"), shapes)["lm_head.weight"].read()`.
    """
    config = read_adapter_config(folder)
    path = folder / WEIGHTS
    halves: dict[str, dict[str, Stored]] = {}
    for key, stored in read_header(path).items():
        match = _KEY.fullmatch(key)
        weight = _weight_name(match[1]) if match else ""
        if match is None or weight not in base:
            raise VLBridgeError(
                f"{path}: {key}: expected base_model.model.<module>.lora_A.weight or lora_B.weight of a module of the "
                f"base, found {weight or 'another name'}. Use the base that the adapter was trained on."
            )
        halves.setdefault(weight, {})[match[2]] = stored
    if not halves:
        raise VLBridgeError(f"{path}: expected the tensors of an adapter, found none. Fetch the file again.")
    return {weight: _pair(config, path, weight, found, base[weight]) for weight, found in halves.items()}


def _weight_name(module: str) -> str:
    """The base weight of an adapted module; `peft` wraps both parameters of the experts in one another."""
    if module.endswith(".mlp.experts.base_layer"):
        return module.removesuffix("base_layer") + "gate_up_proj"
    return module + (".down_proj" if module.endswith(".mlp.experts") else ".weight")


def _pair(
    config: AdapterConfig, path: Path, weight: str, found: Mapping[str, Stored], shape: tuple[int, ...]
) -> LoraPair:
    if found.keys() != {"A", "B"}:
        raise VLBridgeError(f"{path}: {weight}: expected lora_A and lora_B, found lora_{min(found)} alone.")
    experts = shape[0] if len(shape) == 3 else None
    module = weight.removesuffix(".weight")
    rank = config.rank_of(module) * (experts or 1)
    expected = {"A": (rank, shape[-1]), "B": (shape[-2], rank)}
    for half, size in expected.items():
        if found[half].spec.shape != size:
            raise VLBridgeError(
                f"{path}: {weight}: lora_{half}: expected {list(size)} for {list(shape)} and rank "
                f"{config.rank_of(module)}, found {found[half].spec}. Use the base that the adapter was trained on."
            )
    return LoraPair(found["A"], found["B"], config.scaling_of(module), experts)
